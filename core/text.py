"""Several text encoders of a family as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .family import Family, Part, TextEncoder, TextStates, Tokenizer


class JointTokenizer:
    """The tokenizers of several encoders."""

    def __init__(self, tokenizers: Sequence[Tokenizer]) -> None:
        self.tokenizers = tokenizers

    def too_long(self, prompt: str) -> int:
        return max(tokenizer.too_long(prompt) for tokenizer in self.tokenizers)


class JointTextEncoder:
    """Each encoder gives its own states of a prompt, and is brought when it is its turn."""

    def __init__(self, encoders: Sequence[Callable[[], TextEncoder]]) -> None:
        self.encoders = encoders
        self.tokenizer = JointTokenizer([encoder().tokenizer for encoder in encoders])

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """One TextStates per prompt, on the CPU."""
        each: list[TextStates] = [{} for _ in prompts]
        for bring in self.encoders:
            for states, more in zip(each, bring().encode(prompts), strict=True):
                states.update(more)
        return each


def check_complete(parts: Sequence[Part], family: Family) -> None:
    """Raise ValueError unless these text encoders give all that the family's models take of a prompt, each once."""
    given = [name for part in parts for name in part.gives]
    titles = " and ".join(part.title for part in parts)
    if any(part.family != family.name for part in parts) or len(set(given)) < len(given):
        raise ValueError(f"{titles} do not belong together: link one text encoder of each kind that the model takes.")
    if set(given) != set(family.text_states):
        raise ValueError(
            f"{titles} alone cannot encode prompts for {family.title}: link the text encoders that it takes into one another."
        )
