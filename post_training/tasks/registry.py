"""All families of problems by name."""

from __future__ import annotations

from post_training.tasks import addition, passkey, reversal, sorting
from post_training.tasks.problem import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (addition.FAMILY, reversal.FAMILY, sorting.FAMILY, passkey.FAMILY)
}
