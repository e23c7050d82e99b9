"""Parsers and interchangers that ship are such to a type checker too, as a class or as an object."""

from flowkit import Flowkit
from flowkit.interchangers import Base64, Interchanger, Zlib, Zstd
from flowkit.parsers import Json, Parser, Raw, Text
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.registry import Avro, JsonSchema
from flowkit.parsers.xml import Xml

app = Flowkit("shop")
avro = Avro("http://127.0.0.1:8081", schema={"type": "string"}, topic="orders", serializer={}, deserializer={})

parsers: list[Parser] = [Json, Text, Raw, MessagePack, Xml]
made: list[Parser] = [Json(), MessagePack(), Xml(), avro, avro.for_topic("a"), JsonSchema({"url": ""}, schema=int)]
interchangers: list[Interchanger] = [Base64(), Zlib(9), Zstd(level=3)]

app.responds_to("invoices", required=False, multiple_usage=True, parser=avro)
app.producer.send("invoices", 1, parser=MessagePack)
app.producer.send("invoices", 1, parser=int)  # type: ignore[arg-type]
Avro("http://127.0.0.1:8081", shema="")  # type: ignore[call-arg]
