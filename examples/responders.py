"""Responders kept apart from their handlers, as functions and as classes. Try it: flowkit flow responders:app"""

from dataclasses import dataclass
from typing import Any

from flowkit import Flowkit

app = Flowkit("accounts", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


@dataclass
class User:
    id: int
    login: str
    registered: bool = True


# --8<-- [start:handler]
@app.topic("orders")
@app.responds_to("invoices")  # required, exactly one: both are the default
@app.responds_to("alerts", required=False, multiple_usage=True)
def bill(order: dict[str, Any]) -> None:
    app.respond_to("invoices", {"order": order["id"]}, key=order["user"])
    if order["total"] > 1000:
        app.respond_to("alerts", {"order": order["id"]})


@app.topic("visits", inline=True)
@app.responds_to("greetings")
def greet(visit: dict[str, Any]) -> str:
    return f"Hello {visit['user']}"  # with one declared topic, what is returned is the response


# --8<-- [end:handler]


# --8<-- [start:function]
@app.responds_to("users.created")
def announce(user: User) -> None:
    app.respond_to("users.created", user, key=str(user.id))


@app.topic("signups", responder=announce)
def create(signup: dict[str, Any]) -> User:
    return User(signup["id"], signup["login"])  # what is returned goes to the responder


# --8<-- [end:function]


# --8<-- [start:class]
@app.responds_to("users.notified")
@app.responds_to("profiles.notified", required=False)
class Notify:
    def respond(self, user: User, profile: dict[str, Any]) -> None:
        app.respond_to("users.notified", user)
        if user.registered:
            app.respond_to("profiles.notified", profile)


@app.topic("logins", responder=Notify)
def login(user: User) -> None:
    app.respond_with(Notify, user, {"of": user.id})  # by hand, where there is more than one argument


# --8<-- [end:class]


# --8<-- [start:inherited]
@app.responds_to("audit")
class NotifyAndAudit(Notify):
    """Declares what its parent declares, and one topic more. The parent is unchanged."""

    def respond(self, user: User, profile: dict[str, Any]) -> None:
        super().respond(user, profile)
        app.respond_to("audit", f"{user.login} was notified")


# --8<-- [end:inherited]


# --8<-- [start:object]
@app.responds_to("mails")
@dataclass
class Mail:
    """One that needs to know something is made first, and named as the object it is."""

    sender: str

    def respond(self, user: User) -> None:
        app.respond_to("mails", {"from": self.sender, "to": user.login})


@app.topic("reminders", responder=Mail("shop@example.org"))
def remind(user: User) -> User:
    return user


# --8<-- [end:object]


# --8<-- [start:partitions]
@app.responds_to("events", multiple_usage=True)
def place(user: User) -> None:
    app.respond_to("events", "to partition 1", partition=1)
    app.respond_to("events", "with all whose login starts alike", partition_key=user.login[0].lower())
    app.respond_to("events", "with all of this user, and labelled so", key=user.login)
    app.respond_to("events", "wherever there is room")


# --8<-- [end:partitions]


# --8<-- [start:outside]
def nightly_report(users: list[User]) -> None:
    """Outside a handler it sends, and waits until Kafka has it all; DeliveryError if not."""
    for user in users:
        app.respond_with(announce, user)


# --8<-- [end:outside]
