"""A parser and an interchanger of one's own: any object, class or module with two functions.

Needs: pip install 'flowkit-kafka[xml]'. Try it: flowkit dev own_formats:app
"""

import lzma
from typing import Any
from xml.etree import ElementTree

from defusedxml.ElementTree import fromstring

from flowkit import Flowkit, ParserError

app = Flowkit("own-formats", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


# --8<-- [start:parser]
class XmlParser:
    """Flat XML documents as dicts: <order><id>7</id></order> is {"id": "7"}."""

    class Mistake(ParserError):
        """A value that is not such a document."""

    def __init__(self, root: str) -> None:
        self.root = root

    def parse(self, data: bytes) -> dict[str, str]:
        try:
            root = fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise self.Mistake(f"not XML: {error}") from error
        if root.tag != self.root:
            raise self.Mistake(f"the root is <{root.tag}>, not <{self.root}>")
        return {item.tag: item.text or "" for item in root}

    def generate(self, value: dict[str, Any]) -> bytes:
        root = ElementTree.Element(self.root)
        for name, item in value.items():
            ElementTree.SubElement(root, name).text = str(item)
        return ElementTree.tostring(root)


# --8<-- [end:parser]


# --8<-- [start:interchanger]
class Lzma:
    """Takes its time, and the least of Redis."""

    @staticmethod
    def load(value: bytes) -> bytes:
        return lzma.compress(value)

    @staticmethod
    def parse(data: bytes) -> bytes:
        return lzma.decompress(data)


# --8<-- [end:interchanger]


# --8<-- [start:route]
@app.topic("orders", parser=XmlParser("order"), interchanger=Lzma)
@app.responds_to("invoices", parser=XmlParser("invoice"))
def bill(order: dict[str, str]) -> dict[str, Any]:
    return {"order": order["id"], "total": float(order["price"]) * 1.19}


# --8<-- [end:route]
