"""An application with a secret in each place where one can be. Nobody answers at its servers; its handlers are never called."""

import os

from flowkit import Flowkit, Retry
from flowkit.parsers.registry import Avro

REGISTRY = "http://ann:s3cret-registry@127.0.0.1:1"
LOGIN = {
    "sasl_mechanism": "PLAIN",
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_plain_username": "ann",
    "sasl_plain_password": "s3cret-sasl",
    "sasl_oauth_token_provider": None,
}
if os.environ.get("SECRETIVE_KEY"):  # files of a certificate and its key, which is encrypted
    LOGIN |= {"security_protocol": "SASL_SSL"}
    LOGIN["ssl"] = {
        "client_cert": os.environ["SECRETIVE_KEY"],
        "client_cert_key": os.environ["SECRETIVE_KEY"],
        "client_cert_key_password": "s3cret-key",
    }
REDIS = {
    "url": "redis://ann:s3cret-redis@127.0.0.1:1/0",
    "dict": {"host": "127.0.0.1", "port": 1, "username": "ann", "password": "s3cret-redis"},
    "query": "redis://127.0.0.1:1/0?password=s3cret-redis",
    "tls": "rediss://ann:s3cret-redis@127.0.0.1:1/0",
    "unix": "unix://ann:s3cret-redis@/nowhere/redis.sock",
}

app = Flowkit(
    "secretive",
    kafka={"hosts": "127.0.0.1:1", **LOGIN},
    redis=REDIS[os.environ.get("SECRETIVE_REDIS", "url")],
    retry=Retry(attempts=2),
    connection_pool={"timeout": 0.5},
)
avro = Avro(
    {"url": REGISTRY, "bearer.auth.token": "s3cret-bearer"}
    if os.environ.get("SECRETIVE_BEARER")
    else {"url": REGISTRY.replace("ann:s3cret-registry@", ""), "basic.auth.user.info": "ann:s3cret-registry"},
    schema={"type": "record", "name": "Order", "fields": [{"name": "id", "type": "int"}]},
)


@app.topic("orders", parser=avro, dead_letter="orders.dead")
@app.responds_to("invoices", required=False)
def bill(order: dict[str, int]) -> None:
    pass


@app.topic("inline", inline=True)
def note(order: dict[str, int]) -> None:
    pass
