"""Files and Datasets as records, and answers written back into them: one class a format."""

from fabe_ds.answers import Answers
from fabe_ds.files import Replacing
from fabe_ds.formats.base import Format, Records, Row, Settings, Source, Tick
from fabe_ds.formats.discover import InputFile

__all__ = [
    "Answers",
    "Format",
    "InputFile",
    "Records",
    "Replacing",
    "Row",
    "Settings",
    "Source",
    "Tick",
]
