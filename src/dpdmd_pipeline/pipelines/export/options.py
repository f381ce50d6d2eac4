"""Options of the export stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpdmd_pipeline.bounds import StrictModel, Text


class Licensed(StrictModel):
    """A licence, under the hub's name of it."""

    license: Text | None  # such as apache-2.0; `other` needs name and link; null if unknown
    license_name: Text | None  # of the licence `other`, else null
    license_link: Text | None  # the same

    @model_validator(mode="after")
    def _check_licence(self) -> Self:
        if (self.license == "other") != bool(self.license_name and self.license_link):
            raise ValueError(
                f"license={self.license}: license_name and license_link belong to `other`, which needs both"
            )
        return self


class KnownTeacher(Licensed):
    """A teacher on the hub and the licence of its weights, which also applies to its students."""

    model: Text  # id on the hub
    license: Text


class ExportOptions(Licensed):
    """Forms of the export and facts of its model card; a student with full weights gets no form `lora`.

    A license of null means that of `teacher`, if this run uses that teacher; else the card says that it is unknown.
    """

    title: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of the model, and name of its files
    formats: Annotated[list[Literal["diffusers", "comfyui", "lora"]], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"]  # of all exported weights: network, text encoders and autoencoder
    base_model: Text | None  # hub id of the teacher; null: the id it was fetched with, or the name of its folder
    teacher: KnownTeacher | None  # the environment's own teacher; a run may use another one
