"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Width = Annotated[int, Field(ge=1, le=1 << 16)]
"""Of a layer, in heads, ranks, bumps or alike: more is a slip of the pen, and no memory holds it."""
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
NoneOrMore = Annotated[int, Field(ge=0, lt=1 << 31)]


class Strict(BaseModel):
    """A recipe section: an unknown key is an error, not a surprise, and so is a number that is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
