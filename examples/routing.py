"""Every option of a route. Try it: flowkit routes routing:app, flowkit dev routing:app"""

import base64
from typing import Any

from flowkit import Flowkit, Message, Retry
from flowkit.parsers import Text

app = Flowkit("media", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


# --8<-- [start:topic]
@app.topic("videos.new")
def index(video: dict[str, Any]) -> None:
    print("indexing", video["title"])


# --8<-- [end:topic]


# --8<-- [start:group]
@app.topic("videos.rated", group="ratings")
@app.topic("books.rated", group="ratings")
def count(rating: dict[str, Any], message: Message) -> None:
    print(message.topic, rating["stars"])


# --8<-- [end:group]


# --8<-- [start:inline]
@app.topic("videos.watched", inline=True)
def watched(event: dict[str, Any]) -> None:
    """Quick work: it runs in the consumer, message after message, in the order of the partition."""
    print("watched", event["title"])


# --8<-- [end:inline]


# --8<-- [start:queue]
@app.topic(
    "videos.uploaded", queue="slow", job_timeout=3600, retry=Retry(attempts=3, first=60), dead_letter="videos.dead"
)
def transcode(video: dict[str, Any]) -> None:
    """Heavy work: an RQ worker of the queue ``slow`` does it, and may take an hour for each message."""
    print("transcoding", video["title"])


# --8<-- [end:queue]


# --8<-- [start:worker]
class PrintingWorker:
    """Stands for Celery, Dramatiq, Huey: ``perform_async`` hands the message over, ``app.perform`` handles it there."""

    def perform_async(self, topic: str, params: dict[str, Any]) -> None:
        print("handed over:", topic, params["value"])


@app.topic("videos.deleted", worker=PrintingWorker())
def delete(video: dict[str, Any]) -> None:
    print("deleting", video["title"])


# --8<-- [end:worker]


# --8<-- [start:ordered]
@app.topic("videos.edited", ordered=True, shards=2)
def edit(video: dict[str, Any], message: Message) -> None:
    print("edit", message.offset, "of", video["title"])


# --8<-- [end:ordered]


# --8<-- [start:parser]
@app.topic("titles", parser=Text, inline=True)
def title(text: str) -> None:
    print("a title:", text)


# --8<-- [end:parser]


# --8<-- [start:interchanger]
class Base64Interchanger:
    """The seed's example: binary messages as text while they are in Redis."""

    @staticmethod
    def load(value: bytes) -> str:
        return base64.b64encode(value).decode()

    @staticmethod
    def parse(data: str) -> bytes:
        return base64.b64decode(data)


@app.topic("videos.details", interchanger=Base64Interchanger)
def details(video: dict[str, Any]) -> None:
    print("details of", video["title"])


# --8<-- [end:interchanger]


# --8<-- [start:responder]
@app.responds_to("videos.announced")
def announce(title: str) -> None:
    app.respond_to("videos.announced", {"title": title}, key=title)


@app.topic("videos.published", responder=announce)
def publish(video: dict[str, Any]) -> str:
    return str(video["title"]).title()


# --8<-- [end:responder]
