"""transformers' classes of configurations, without its models.

`transformers.utils.type_validators` imports every activation function, to check their names, and with them DTensor,
sympy and torch's compiler: a third of the time to load a small model. It does without that check where it finds no
torch. `engine.models.layers.activation` refuses an unknown name.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from transformers import AutoConfig

_VALIDATORS = "transformers.utils.type_validators"


def auto_config() -> type[AutoConfig]:
    """Import `transformers.AutoConfig`."""
    from transformers import AutoConfig

    if _VALIDATORS not in sys.modules:
        # What the validators import as well is imported before, because it shall find torch.
        import transformers.tokenization_utils_base
        import transformers.utils.generic
        import transformers.video_utils
        from transformers.utils import import_utils

        with mock.patch.object(import_utils, "is_torch_available", return_value=False):
            import transformers.utils.type_validators  # noqa: F401
    return AutoConfig  # type: ignore[no-any-return]
