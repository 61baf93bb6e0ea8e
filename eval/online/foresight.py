"""The oracle of decoding: what the answer given with full attention went on to attend to."""

import torch

from eval.online.session import Session


class Foresight:
    """Remembers the attention of a full-attention run and scores chunks by what each window of it needed.

    `watch` is called after every token that the full run reads. As a policy, the score of a chunk at a refresh is the
    attention mass on it of the `window` tokens that the full run read next, averaged over them, heads and
    full-attention layers, as in the traces. For text that is the future itself: every policy reads the same tokens.
    For answers it is the future as long as they agree with full attention's; after that, and beyond the end of the
    full answer (whose last token then stands for the rest), it is what the full run needed.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._masses: dict[int, torch.Tensor] = {}

    def watch(self, session: Session) -> None:
        """Keep the newest token's attention mass per complete chunk. Everything must be resident."""
        self._masses[session.position] = session.mass()

    def __call__(self, session: Session) -> torch.Tensor:
        """Scores [N] of the complete chunks for the window behind the newest token."""
        last = max(self._masses)
        first = min(session.position + 1, last)
        window = [self._masses[place] for place in range(first, min(first + self.window, last + 1))]
        visible = session.chunking.visible(session.position)
        scores = torch.zeros(visible)
        for mass in window:
            scores[: len(mass)] += mass[:visible]
        return scores / len(window)
