"""Scores from questions to a vision-language model: VQA score, questions about parts, rated quality.

An answer of another form than the question requires is NaN; callers count these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator
from torch import Tensor

from dpdmd_pipeline.metrics.embedders import load_pretrained
from dpdmd_pipeline.metrics.errors import UnfitError
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.wording import validation_faults

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
    """A chat model with vision: any AutoModelForImageTextToText with its processor."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.float32 if passes.device == "cpu" else torch.bfloat16
        self.model = load_pretrained(AutoModelForImageTextToText, folder, dtype=dtype).to(passes.device)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # One picture at a time on a GPU too: lengths differ, and padding would change bits.
        self.passes = Passes(passes.device, 1)

    def probability(self, answer: str, question: str, images: Sequence[Image]) -> Tensor:
        """Probability that the model's answer begins with the first token of `answer`, [n]."""
        token = self.processor.tokenizer(answer, add_special_tokens=False).input_ids[0]
        return self.passes.run(lambda chunk: self._next_token(question, chunk[0])[token][None], images)

    def answer(self, question: str, image: Image, max_new_tokens: int) -> str:
        """The most likely answer, decoded greedily."""
        inputs = self._inputs(question, image)
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "num_beams": 1}
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    def _next_token(self, question: str, image: Image) -> Tensor:
        return self.model(**self._inputs(question, image)).logits[0, -1].float().softmax(-1)

    def _inputs(self, question: str, image: Image) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.processor(text=[text], images=[image], return_tensors="pt").to(self.passes.device)


def vqa_score(model: VisionLanguage, text: str, images: Sequence[Image]) -> Tensor:
    """VQAScore (arXiv:2404.01291): P("Yes") for a question that asks if the picture shows the prompt, [n]."""
    return model.probability("Yes", VQA_QUESTION.format(text=text), images)


def rated_quality(model: VisionLanguage, text: str, images: Sequence[Image]) -> Tensor:
    """VisualQuality-R1 (arXiv:2505.14460), decoded greedily, [n]; an answer without a rating is NaN."""
    return torch.tensor([rating(model.answer(RATING_QUESTION, image, _RATING_TOKENS)) for image in images])


def rating(answer: str) -> float:
    """The number between the last answer tags, 1 to 5; NaN if there is none."""
    tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", tagged[-1]) if tagged else None
    value = float(number[1]) if number else math.nan
    return value if 1 <= value <= 5 else math.nan


def part_answers(model: VisionLanguage, records: Mapping[str, dict], text: str, images: Sequence[Image]) -> Tensor:
    """Probability of the right answer to one question for each part of a prompt, [n, parts].

    Questions are as in GenEval (arXiv:2310.11513), whose `records` are by text of their prompt. But GenEval counts with
    a detector: call these numbers geneval_vqa.

    Raises:
        UnfitError: if the prompt has no record, or one without valid parts.
    """
    if text not in records:
        raise UnfitError("prompt without a record of its parts (add it to the metadata file)")
    try:
        questions = part_questions(records[text])
    except ValueError as error:
        raise UnfitError(f"prompt with an invalid record of its parts ({error})") from error
    return torch.stack([model.probability(right, question, images) for question, right in questions], dim=1)


class _Part(BaseModel):
    """An object that a picture must or must not show; `position` is a relation and the index of another part."""

    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1, le=1000)
    color: str | None = None
    position: tuple[str, NonNegativeInt] | None = None

    def presence(self) -> str:
        if self.count == 1:
            return f"Is there a {self.name} in this picture? Please answer yes or no."
        return f"Are there at least {self.count} {self.name}s in this picture? Please answer yes or no."

    def colour(self) -> str:
        verb, noun = ("Is", self.name) if self.count == 1 else ("Are all", f"{self.name}s")
        return f"{verb} the {noun} in this picture {self.color}? Please answer yes or no."

    def relation(self, relation: str, other: str) -> str:
        where = relation if relation in {"above", "below"} else f"to the {relation}"
        return f"Is the {self.name} {where} the {other} in this picture? Please answer yes or no."


class _Record(BaseModel):
    """One line of GenEval's evaluation_metadata.jsonl, without the fields that questions do not need."""

    include: list[_Part] = []
    exclude: list[_Part] = []

    @model_validator(mode="after")
    def _has_valid_parts(self) -> Self:
        if not self.include and not self.exclude:
            raise ValueError("no parts: give include or exclude")
        for part in self.include:
            if part.position and part.position[1] >= len(self.include):
                raise ValueError(f"position of {part.name} names part {part.position[1]} of {len(self.include)}")
        return self


def part_questions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions and their right answers for one record of GenEval.

    Raises:
        ValueError: if the record has no part, or a part lacks its class or count.
    """
    try:
        parts = _Record.model_validate(record)
    except ValidationError as error:
        raise ValueError(validation_faults(error)) from error
    questions = []
    for part in parts.include:
        questions.append((part.presence(), "Yes"))
        if part.color:
            questions.append((part.colour(), "Yes"))
        if part.position:
            relation, other = part.position
            questions.append((part.relation(relation, parts.include[other].name), "Yes"))
    return [*questions, *((part.presence(), "No") for part in parts.exclude)]
