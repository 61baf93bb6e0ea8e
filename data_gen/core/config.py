"""What every section of a recipe is made of."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A recipe section: an unknown key is an error, not a surprise, and so is a number that is infinite or none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
