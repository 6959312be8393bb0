"""Exercise 3.2: a sampler. Check it with `quire course check 3.2`.

From one row of logits to one token: penalties, temperature, min-p, top-k, top-p, and a draw. The names and the rules
are those of `SamplingParams`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def penalized(
    logits: NDArray[Any],  # [vocabulary]
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> NDArray[np.float64]:  # [vocabulary]
    """New logits; the given ones stay as they are.

    1. Tokens of the prompt or the output: a logit above 0 is divided by `repetition_penalty`, another is multiplied.
    2. Tokens of the output: minus `frequency_penalty` for each time, minus `presence_penalty` once.
    """
    raise NotImplementedError


def probabilities(
    logits: NDArray[Any],  # [vocabulary]
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> NDArray[np.float64]:  # [vocabulary]
    """What each token is drawn with; what is cut away has 0, and the sum is 1.

    1. Temperature 0: all for the largest logit, of equals the lowest id. Otherwise softmax of `logits / temperature`;
       neither large logits nor a small temperature may overflow.
    2. min-p: keep tokens with at least `min_p` of the largest probability.
    3. top-k: of these the k most probable; of equals the lower ids. 0: all.
    4. top-p: of these, the most probable first (of equals the lower ids), each as long as those before it have less
       than `top_p` of what step 3 has kept. The first always stays.
    """
    raise NotImplementedError


def sample(probs: NDArray[np.float64], rng: np.random.Generator) -> int:
    """A token drawn from `probs [vocabulary]`, with `rng` as the only source of chance."""
    raise NotImplementedError
