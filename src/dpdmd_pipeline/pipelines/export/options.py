"""Options of the export stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class KnownTeacher(BaseModel):
    """A teacher of the hub, and the licence of its weights, which is also that of its students.

    Attributes:
        model: id on the hub.
        license: as the hub names it, as in apache-2.0; `other` with name and link.
        license_name, license_link: of the licence `other`, else null.
    """

    model_config = _STRICT

    model: Annotated[str, Field(min_length=1)]
    license: Annotated[str, Field(min_length=1)]
    license_name: str | None
    license_link: str | None

    @model_validator(mode="after")
    def _names_another_licence(self) -> Self:
        _check_licence(self)
        return self


class ExportOptions(BaseModel):
    """What is written, and what the model card says of it.

    Attributes:
        title: of the model; its files are called so.
        formats: which forms are written; `lora` only where the student is one.
        dtype: of the exported weights.
        license: as the hub names it, as in apache-2.0; `other` with name and link. Null: that of the teacher, if it is
            the one that is named below; else the card says that it is not known.
        license_name, license_link: of the licence `other`, else null.
        base_model: hub id of the teacher. Null: the id that it was fetched by; of a folder the card says the name.
        teacher: what is known of the environment's own teacher, which need not be this run's.
    """

    model_config = _STRICT

    title: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    formats: Annotated[list[Literal["diffusers", "comfyui", "lora"]], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"]
    license: Annotated[str, Field(min_length=1)] | None
    license_name: str | None
    license_link: str | None
    base_model: str | None
    teacher: KnownTeacher | None

    @model_validator(mode="after")
    def _names_another_licence(self) -> Self:
        _check_licence(self)
        return self


def _check_licence(options: KnownTeacher | ExportOptions) -> None:
    """Name and link belong to the licence `other`, which has none of its own."""
    if (options.license == "other") != bool(options.license_name and options.license_link):
        raise ValueError(
            f"license={options.license}: license_name and license_link go with `other`, and `other` needs both"
        )
