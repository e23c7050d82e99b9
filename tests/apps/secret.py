"""An application whose settings hold secrets."""

from flowkit import Flowkit

app = Flowkit(
    "secret",
    redis="redis://ann:hunter2@127.0.0.1:1/0",
    kafka={"sasl_mechanism": "PLAIN", "sasl_plain_username": "ann", "sasl_plain_password": "hunter2"},
)
