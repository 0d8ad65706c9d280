"""Sentences that describe the classes to a model of images and text: part of what a hospital approves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base

PLACE = "{}"
"""Where a template takes the words of a class."""
ZERO_SHOT, LEARNED = "zero-shot", "prompt-learning"
MAX_LENGTH = 200
MAX_CONTEXT = 64

Text = Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]


class WordsConfig(pydantic.BaseModel):
    """How an image is held against sentences, one or several a class; see :mod:`fedvfm.tasks.words`.

    The words of a class stand at ``{}`` in each template. With "zero-shot" the sentences stay as they are; with
    "prompt-learning" the ``context`` vectors before the words of the class train and travel, and begin as the words
    that stand before ``{}`` in the template, or, where none do, as small numbers from the seed.
    """

    model_config = base.SETTINGS

    mode: Literal["zero-shot", "prompt-learning"] = "zero-shot"
    """zero-shot (the sentences as they are; nothing of them trains) or prompt-learning (what stands before the words of
    a class is learned, a few kB). Change: to prompt-learning where hospitals have some labelled images of each class.
    """
    templates: Annotated[tuple[Text, ...], Field(strict=False, min_length=1, max_length=32)] = ("a photo of {}",)
    """Sentences with {} where the words of a class stand; of several the mean is taken, prompt-learning takes one.
    Change: to what such images are called, as "a chest X-ray of {}"."""
    names: Annotated[tuple[Text, ...], base.names()] = ()
    """The words of each class, in the order of class_names; empty: class_names themselves. Change: where a class has a
    short name that no sentence would use."""
    context: Annotated[int, Field(ge=0, le=MAX_CONTEXT)] = 0
    """(vectors) Of prompt-learning, how many are learned; with words before {}, the number of their tokens, which an
    error says. Change: to 4 or 16 with the template "{}"."""
    per_class: bool = False
    """Whether each class has context vectors of its own. Change: to true with many labelled images of each class."""
    tokenizer_sha256: base.Sha256 | None = None
    """Of the model's tokenizer.json; locking fills it in. Change: leave it to 'fedvfm recipe lock'."""
    pad: Annotated[int, Field(ge=0)] | None = None
    """(number of a token) What SigLIP fills short sentences up with; locking fills it in. Change: leave it to 'fedvfm
    recipe lock'."""

    @property
    def learned(self) -> bool:
        """Whether context vectors train."""
        return self.mode == LEARNED

    @property
    def begins(self) -> str:
        """The words before the class, of prompt-learning's template."""
        return self.templates[0].partition(PLACE)[0].strip()

    def sentences(self, class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Class by class, its words in every template."""
        return tuple(
            tuple(template.replace(PLACE, words) for template in self.templates) for words in self.names or class_names
        )

    def describe(self, class_names: Sequence[str]) -> str:
        """What images are held against, as the model will read it: for whoever approves it, reports and cards."""
        more = self.templates[1:]
        listed = "; ".join(f"'{group[0]}'" for group in self.sentences(class_names))
        others = f"; and in the same way {len(more)} more: " + "; ".join(f"'{each}'" for each in more) if more else ""
        if not self.learned:
            return f"each image is held against {listed}{others}. They stay as they are"
        whose = "each class its own" if self.per_class else "the same for all classes"
        begins = f"begin as '{self.begins}'" if self.begins else "begin as no words"
        return (
            f"each image is held against {listed}, where {self.context} learned vectors, {whose}, stand before the "
            f"class; they {begins}, train at the sites and leave with each update. What they come to is no words"
        )

    def faults(self, class_names: Sequence[str]) -> list[str]:
        """What does not fit together, one sentence a fault.

        Args:
            class_names: ``recipe.data.class_names``.
        """
        wrong = [f"recipe.words.{fault}" for fault in self._template_faults() + self._name_faults(class_names)]
        if self.learned and len(self.templates) > 1:
            wrong.append(
                f"recipe.words.templates: prompt-learning takes one, {len(self.templates)} are given; keep the best"
            )
        if self.learned and not self.context:
            begins = f"as many as '{self.begins}' has tokens (about one a word)" if self.begins else "4 or 16 is usual"
            wrong.append(f"recipe.words.context = 0: prompt-learning needs a number of vectors: {begins}")
        if not self.learned and (self.context or self.per_class):
            wrong.append("recipe.words: mode 'zero-shot' reads neither context nor per_class; leave them out")
        return wrong

    def _template_faults(self) -> list[str]:
        wrong = []
        for template in self.templates:
            shown = ascii(template[:60])
            if template.count(PLACE) != 1 or set(template.replace(PLACE, "")) & set("{}"):
                wrong.append(f"templates: {shown} must hold {{}} once, where the words of a class stand")
            elif not template.isprintable() or template != " ".join(template.split()):
                wrong.append(f"templates: {shown}: letters, signs and single spaces only, none at its ends")
            elif self.learned and self.begins and not template.partition(PLACE)[0].endswith(" "):
                wrong.append(f"templates: {shown}: a space must stand before {{}}, or no vector begins as a word")
        if len(set(self.templates)) < len(self.templates):
            wrong.append("templates: two are alike")
        return wrong

    def _name_faults(self, class_names: Sequence[str]) -> list[str]:
        if self.names and len(self.names) != len(class_names):
            return [
                f"names: {len(self.names)} given for {len(class_names)} of recipe.data.class_names "
                f"({', '.join(class_names)}); give one for each"
            ]
        names = self.names or tuple(class_names)
        wrong = [
            f"names: {name[:60]!a}: letters, signs and single spaces only, none at its ends, and no braces"
            for name in names
            if not name.isprintable() or name != " ".join(name.split()) or set(name) & set("{}")
        ]
        if len({name.casefold() for name in names}) < len(names):
            wrong.append("names: two classes have the same words, so no sentence tells them apart")
        return wrong
