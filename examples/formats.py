"""One application, six formats: what a message is written in is said where its topic is named.

Needs: pip install 'flowkit-kafka[msgpack,xml,zstd]'. Try it: flowkit dev formats:app
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from flowkit import Flowkit, Message
from flowkit.interchangers import Zlib, Zstd
from flowkit.parsers import Raw, Text
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.xml import Xml

app = Flowkit("formats", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


# --8<-- [start:text]
@app.topic("lines", parser=Text)
@app.responds_to("words", multiple_usage=True)
def split(line: str) -> None:
    for word in line.split():
        app.respond_to("words", word)


# --8<-- [end:text]


# --8<-- [start:raw]
@app.topic("photos", parser=Raw, interchanger=Zlib())
@app.responds_to("sizes", parser=Text)
def measure(photo: bytes) -> int:
    return len(photo)


# --8<-- [end:raw]


# --8<-- [start:msgpack]
@dataclass
class Reading:
    sensor: str
    celsius: float


@app.topic("readings")  # JSON comes in ...
@app.responds_to("readings.packed", parser=MessagePack)  # ... and MessagePack goes out
def pack(reading: Reading) -> Reading:
    return reading


# --8<-- [end:msgpack]


# --8<-- [start:xml]
@app.topic("orders.xml", parser=Xml)
@app.responds_to("receipts.xml")
def receive(order: Element) -> Element:
    receipt = Element("receipt", order=order.get("id", ""))
    SubElement(receipt, "total").text = str(sum(float(item.get("price", "0")) for item in order.iter("item")))
    return receipt


# --8<-- [end:xml]


# --8<-- [start:failure]
@app.topic("letters", interchanger=Zstd())
@app.responds_to("letters.odd", parser=Raw, required=False)
def read(letter: dict, message: Message) -> None:  # type: ignore[type-arg]
    if letter == {"message": message.value}:  # what is not JSON arrives as its bytes
        app.respond_to("letters.odd", message.value)


# --8<-- [end:failure]
