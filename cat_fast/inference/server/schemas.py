"""Bodies of requests; FastAPI validates them and documents them in OpenAPI."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
)

from cat_fast.inference.pipeline.cat_pipeline import MAX_SEED
from cat_fast.inference.server.settings import MAX_IMAGES, MAX_PROMPT_CHARACTERS, MAX_STEPS


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("expected text, not only spaces")
    return value


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Tokens = Annotated[StrictInt, Field(ge=1)]
Text = Annotated[StrictStr, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_not_blank)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerationBody(_Body):
    """Body of POST /v1/images/generations: OpenAI's fields, and those of content-adaptive tokenization."""

    prompt: Text
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    model: StrictStr | None = Field(None, description="The name that /v1/models lists.")
    size: Annotated[StrictStr, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = Field(
        "auto", description="WIDTHxHEIGHT in pixels, or auto for the size of training."
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Image i is drawn from seed + i; random if missing."
    )
    response_format: Literal["b64_json"] = "b64_json"
    stream: StrictBool = Field(False, description="Send previews and images as server-sent events.")
    partial_images: Annotated[StrictInt, Field(ge=0, le=10)] = Field(
        3, description="Largest number of previews per image of a stream."
    )
    user: Annotated[StrictStr, Field(max_length=256)] | None = Field(None, description="Written to the log.")
    ratio: Literal["auto", 8, 16, 32] = Field("auto", description="Compression ratio, or auto by complexity.")
    tokens: Tokens | None = Field(None, description="Most tokens per image, in place of ratio.")
    mean_tokens: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Budget of tokens per image over the n images, in place of ratio."
    )
    num_inference_steps: Annotated[StrictInt, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Default: the pipeline's."
    )
    guidance_scale: Annotated[Number, Field(ge=-1e3, le=1e3)] | None = Field(
        None, description="Default: the pipeline's."
    )
    scheduler: Literal["ddpm", "ddim", "dpm++", "euler"] | None = Field(
        None, description="Default: ddim, or euler for a flow."
    )
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    deadline_seconds: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Refuse at once, with 422, if the images cannot be complete in this time."
    )
    allow_coarser: StrictBool = Field(
        False, description="Under load, draw with fewer tokens instead of waiting, simple images first."
    )

    @field_validator("ratio", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool | float):
            raise ValueError("expected 'auto', 8, 16 or 32")
        return value

    def width_and_height(self) -> tuple[int, int] | None:
        """Return the size in pixels; None for the size of training."""
        match = re.fullmatch(r"(\d+)x(\d+)", self.size)
        return None if match is None else (int(match[1]), int(match[2]))


class ComplexityBody(_Body):
    """Body of POST /v1/complexity."""

    description: Text
    has_text: StrictBool | None = Field(None, description="Text is visible; inferred if missing.")
    has_faces: StrictBool | None = Field(None, description="A face is visible; inferred if missing.")
