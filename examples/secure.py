"""Settings for clusters that encrypt and ask who is there: three ways in, each run by a test against a real broker."""

import os

from flowkit import Flowkit

# --8<-- [start:mutual_tls]
mutual_tls = Flowkit(
    "shop",
    kafka={
        "hosts": ["kafka-1.example.com:9093"],
        "ssl": {
            "ca_cert": "certs/ca.pem",  # who signed the brokers' certificates
            "client_cert": "certs/shop.pem",
            "client_cert_key": "certs/shop-key.pem",
            "client_cert_key_password": os.environ.get("SHOP_KEY_PASSWORD"),  # for an encrypted key only
        },
    },
)
# --8<-- [end:mutual_tls]

# --8<-- [start:scram]
scram = Flowkit(
    "shop",
    kafka={
        "hosts": ["kafka-1.example.com:9094"],
        "ssl": {"ca_cert": "certs/ca.pem"},
        "sasl_mechanism": "SCRAM-SHA-512",  # or SCRAM-SHA-256, PLAIN
        "sasl_plain_username": "ann",
        "sasl_plain_password": os.environ.get("SHOP_KAFKA_PASSWORD"),
    },
)
# --8<-- [end:scram]

# --8<-- [start:environment]
# Or nothing about it in the code, and all of it in environment variables:
app = Flowkit("shop")
# --8<-- [end:environment]

for one in (mutual_tls, scram, app):

    @one.topic("orders", inline=True)
    @one.responds_to("invoices")
    def bill(order: dict[str, int]) -> dict[str, int]:
        return {"order": order["id"]}
