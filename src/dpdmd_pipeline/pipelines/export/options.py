"""Options of the export stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ExportOptions(BaseModel):
    """What is written, and what the model card says of it.

    Attributes:
        title: of the model; its files are called so.
        formats: which forms are written; `lora` only where the student is one.
        dtype: of the exported weights.
        license: as the hub names it, as in apache-2.0; `other` with name and link.
        license_name, license_link: of the licence `other`, else null.
        base_model: hub id of the teacher; null if it is on no hub.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    formats: Annotated[list[Literal["diffusers", "comfyui", "lora"]], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"]
    license: Annotated[str, Field(min_length=1)]
    license_name: str | None
    license_link: str | None
    base_model: str | None

    @model_validator(mode="after")
    def _names_another_licence(self) -> Self:
        if (self.license == "other") != bool(self.license_name and self.license_link):
            raise ValueError(
                f"license={self.license}: license_name and license_link go with `other`, and `other` needs both"
            )
        return self
