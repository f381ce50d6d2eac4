"""Scores from questions to a vision-language model: VQA score, questions about parts, rated quality.

What the model does not answer in the asked form is not a number: NaN, counted by who calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import Tensor

from dpdmd_pipeline.metrics.embedders import load_pretrained
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.metrics.weights import UnfitError

if TYPE_CHECKING:
    from PIL.Image import Image

VQA_QUESTION = 'Does this figure show "{text}"? Please answer yes or no.'  # arXiv:2404.01291
RATING_QUESTION = (  # TianheWu/VisualQuality-R1, with reasoning
    "You are doing the image quality assessment task. Here is the question: What is your overall rating on the "
    "quality of this picture? The rating should be a float between 1 and 5, rounded to two decimal places, with 1 "
    "representing very poor quality and 5 representing excellent quality. First output the thinking process in "
    "<think> </think> tags and then output the final answer with only one score in <answer> </answer> tags."
)
_RATING_TOKENS = 2048


class VisionLanguage:
    """A chat model that sees: any AutoModelForImageTextToText with its processor."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.float32 if passes.device == "cpu" else torch.bfloat16
        self.model = load_pretrained(AutoModelForImageTextToText, folder, dtype=dtype).to(passes.device)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        # One picture at a time also on a GPU: pictures and questions differ in length, and padding would change bits.
        self.passes = Passes(passes.device, 1)

    def probability(self, answer: str, question: str, images: Sequence[Image]) -> Tensor:
        """P(the answer begins with the first token of `answer`), of all words the model knows, [n]."""
        token = self.processor.tokenizer(answer, add_special_tokens=False).input_ids[0]
        return self.passes.run(lambda chunk: self._next(question, chunk[0])[token][None], images)

    def answer(self, question: str, image: Image, max_new_tokens: int) -> str:
        """The most likely answer, decoded greedily."""
        inputs = self._inputs(question, image)
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "num_beams": 1}
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    def _next(self, question: str, image: Image) -> Tensor:
        return self.model(**self._inputs(question, image)).logits[0, -1].float().softmax(-1)

    def _inputs(self, question: str, image: Image) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.processor(text=[text], images=[image], return_tensors="pt").to(self.passes.device)


class VqaScore:
    """VQAScore (arXiv:2404.01291): P("Yes") to the question whether the picture shows the prompt."""

    def __init__(self, model: VisionLanguage) -> None:
        self.model = model

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        return self.model.probability("Yes", VQA_QUESTION.format(text=text), images)


class RatedQuality:
    """VisualQuality-R1 (arXiv:2505.14460), decoded greedily; an answer without a rating is NaN, never a guess."""

    def __init__(self, model: VisionLanguage) -> None:
        self.model = model

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        return torch.tensor([rating(self.model.answer(RATING_QUESTION, image, _RATING_TOKENS)) for image in images])


def rating(answer: str) -> float:
    """The number between the last answer tags, 1 to 5; NaN if there is none."""
    tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", tagged[-1]) if tagged else None
    value = float(number[1]) if number else math.nan
    return value if 1 <= value <= 5 else math.nan


class PartQuestions:
    """One question for each part of a prompt, in the manner of GenEval (arXiv:2310.11513) but asked of a chat model.

    Its numbers are not GenEval's, which are counted by a detector: name them geneval_vqa.

    Args:
        model: that answers.
        records: by text of the prompt, as in GenEval's evaluation_metadata.jsonl.
    """

    def __init__(self, model: VisionLanguage, records: Mapping[str, dict]) -> None:
        self.model, self.records = model, records

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        """P(the right answer) of each part, [n, parts].

        Raises:
            UnfitError: if nothing is known about the parts of this prompt, or nothing that can be asked.
        """
        if text not in self.records:
            raise UnfitError("prompt without a record of its parts (add it to the metadata file)")
        try:
            asked = part_questions(self.records[text])
        except ValueError as error:
            raise UnfitError(f"prompt whose record of parts cannot be asked ({error})") from error
        return torch.stack([self.model.probability(right, question, images) for question, right in asked], dim=1)


class _Part(BaseModel):
    """What a picture is to show, or not to show; `position` is a relation to another part, by its place in the list."""

    name: str = Field(alias="class", min_length=1)
    count: PositiveInt
    color: str | None = None
    position: tuple[str, NonNegativeInt] | None = None

    def is_there(self) -> str:
        """The question whether it is."""
        if self.count == 1:
            return f"Is there a {self.name} in this picture? Please answer yes or no."
        return f"Are there at least {self.count} {self.name}s in this picture? Please answer yes or no."

    def has_its_color(self) -> str:
        """The question whether it has the colour that is asked for."""
        verb, noun = ("Is", self.name) if self.count == 1 else ("Are all", f"{self.name}s")
        return f"{verb} the {noun} in this picture {self.color}? Please answer yes or no."

    def is_placed(self, relation: str, other: str) -> str:
        """The question whether it is where it is asked for."""
        place = relation if relation in {"above", "below"} else f"to the {relation}"
        return f"Is the {self.name} {place} the {other} in this picture? Please answer yes or no."


class _Record(BaseModel):
    """One line of GenEval's evaluation_metadata.jsonl, without what is not asked."""

    include: list[_Part] = []
    exclude: list[_Part] = []

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.include and not self.exclude:
            raise ValueError("names no part: give include or exclude")
        for part in self.include:
            if part.position and part.position[1] >= len(self.include):
                raise ValueError(f"position of {part.name} names part {part.position[1]} of {len(self.include)}")
        return self


def part_questions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions with their right answers, from one record of GenEval.

    Raises:
        ValueError: if the record asks for nothing, or a part lacks its class or count.
    """
    try:
        known = _Record.model_validate(record)
    except ValidationError as error:
        raise ValueError("; ".join(map(_reason, error.errors()))) from error
    asked = []
    for part in known.include:
        asked.append((part.is_there(), "Yes"))
        if part.color:
            asked.append((part.has_its_color(), "Yes"))
        if part.position:
            relation, other = part.position
            asked.append((part.is_placed(relation, known.include[other].name), "Yes"))
    return [*asked, *((part.is_there(), "No") for part in known.exclude)]


def _reason(fault: Mapping[str, Any]) -> str:
    """`include.0.count: Field required`."""
    place = ".".join(map(str, fault["loc"]))
    words = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {words}" if place else words
