"""What a coordinator tells hospitals of the study in its own words: for their ethics boards, signed with the invite."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedvfm.config import schema

FILE = "study.json"
"""In the state folder of either end."""


def _clean(text: str) -> str:
    if not all(sign.isprintable() or sign == "\n" for sign in text):
        raise ValueError("must be text without control characters")
    return text.strip()


class Study(schema.Strict):
    """The study.

    Attributes:
        purpose: what it is to find out, and for whose good.
        contact: who answers for it: name, office, telephone or mail.
        retention: what the coordinator keeps, and for how long.
        hospitals: the other hospitals, as far as they may be named.
        licence: of the result, and who may have it.
    """

    format: Literal["fedvfm-study-1"] = "fedvfm-study-1"
    purpose: Annotated[str, AfterValidator(_clean), Field(min_length=1, max_length=4000)]
    contact: Annotated[str, AfterValidator(_clean), Field(min_length=1, max_length=500)]
    retention: Annotated[str, AfterValidator(_clean), Field(min_length=1, max_length=2000)]
    hospitals: Annotated[str, AfterValidator(_clean), Field(max_length=2000)] = ""
    licence: Annotated[str, AfterValidator(_clean), Field(max_length=500)] = ""

    def words(self) -> list[tuple[str, str]]:
        """Heading and text of what is said."""
        rows = [("purpose", self.purpose), ("contact", self.contact), ("retention", self.retention)]
        rows += [("other hospitals", self.hospitals)] if self.hospitals else []
        return rows + ([("licence of the result", self.licence)] if self.licence else [])
