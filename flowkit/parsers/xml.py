"""XML, read by defusedxml: entity bombs and references to files or addresses are refused. Needs the extra ``xml``."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from ..errors import ParserError, missing_package

try:
    from defusedxml.ElementTree import fromstring
except ImportError as error:
    raise missing_package("flowkit.parsers.xml", "defusedxml", "xml") from error


class Xml:
    """One document a message: ``parse`` gives the root, an ``xml.etree.ElementTree.Element``; ``generate`` takes one.

    It is written in UTF-8. ``generate`` passes text and bytes as they are.
    """

    @staticmethod
    def parse(data: bytes) -> ElementTree.Element:
        try:
            root: ElementTree.Element = fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: of an encoding
            raise ParserError(f"not XML, or not safe: {error}; it starts with {data[:60]!r}") from error
        return root

    @staticmethod
    def generate(value: Any) -> bytes | str:
        if isinstance(value, str | bytes):
            return value
        if isinstance(value, ElementTree.ElementTree):
            value = value.getroot()
        if not isinstance(value, ElementTree.Element):
            raise ParserError(f"{type(value).__name__} cannot be written as XML: give an Element, or text")
        try:
            written: bytes = ElementTree.tostring(value, encoding="utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ParserError(f"the element <{value.tag}> cannot be written as XML: {error}") from error
        return written
