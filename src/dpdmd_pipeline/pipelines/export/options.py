"""Options of the export stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


class Licensed(BaseModel):
    """A licence, under the hub's name of it.

    Attributes:
        license: such as apache-2.0; `other` needs name and link. Null if unknown.
        license_name, license_link: of the licence `other`, else null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    license: Text | None
    license_name: str | None
    license_link: str | None

    @model_validator(mode="after")
    def _check_licence(self) -> Self:
        if (self.license == "other") != bool(self.license_name and self.license_link):
            raise ValueError(
                f"license={self.license}: license_name and license_link belong to `other`, which needs both"
            )
        return self


class KnownTeacher(Licensed):
    """A teacher on the hub and the licence of its weights, which also applies to its students.

    Attributes:
        model: id on the hub.
    """

    model: Text
    license: Text


class ExportOptions(Licensed):
    """Forms of the export and facts of its model card.

    A license of null means that of `teacher`, if this run uses that teacher; else the card says that it is unknown.

    Attributes:
        title: of the model, and name of its files.
        formats: forms to write; `lora` is left out for a student with full weights.
        dtype: of the exported weights.
        base_model: hub id of the teacher. Null: the id it was fetched with, or the name of its folder.
        teacher: the environment's own teacher; a run may use another one.
    """

    title: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    formats: Annotated[list[Literal["diffusers", "comfyui", "lora"]], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"]
    base_model: str | None
    teacher: KnownTeacher | None
