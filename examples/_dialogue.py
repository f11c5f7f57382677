"""A dialogue with a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _docstrings import PROMPT, Turn
from language_model import END, LanguageModel, draw
from tokenizers import Tokenizer
from torch import Tensor

LONGEST_REPLY = 100  # tokens
NO_ANSWER = (">", "Ċ")  # what an answer does not begin with; the tokenizer writes a line's end so


class Dialogue:
    """An exchange with the model; keys and values of what both said are kept."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        temperature: float,
        top_k: int | None,
        seed: int,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.temperature, self.top_k = temperature, top_k
        self.generator = torch.Generator().manual_seed(seed)
        self.end: int = tokenizer.token_to_id(END)
        none = [self.end, *(n for t, n in tokenizer.get_vocab().items() if t.startswith(NO_ANSWER))]
        self.no_answer = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
        self.no_answer[none] = True
        self.longest = min(LONGEST_REPLY, model.settings.context // 2)
        self.forget()

    def forget(self) -> None:
        self.turns: list[str] = []
        self.tokens: list[int] = []  # whose keys and values are in the caches
        self.caches = self.model.caches()

    def hear(self, turn: Turn) -> None:
        """Takes an exchange as if it had been its own."""
        self.turns += [turn.prompt, turn.reply]

    @torch.no_grad()
    def reply(self, prompt: str, is_answered: bool = False) -> str:
        """Answers up to where the user's next turn would begin, not at once if ``is_answered``."""
        self.turns.append(prompt)
        logits = self._read(self._recent())
        if is_answered:
            logits = logits.masked_fill(self.no_answer, -torch.inf)
        written: list[int] = []
        reply, began = "", ""
        while len(written) < self.longest and not began:
            token = draw(logits, self.temperature, self.generator, self.top_k)
            if token == self.end:
                break
            written.append(token)
            reply, began, _ = self.tokenizer.decode(written).partition(PROMPT.strip())
            if not began:
                logits = self._feed([token])
        if reply and not reply.endswith("\n"):
            reply += "\n"
        self.turns.append(reply)
        return reply

    def _recent(self) -> list[int]:
        """The latest turns that leave room for a reply, behind the end of whatever was before."""
        room = self.model.settings.context - self.longest
        while True:
            tokens = [self.end, *self.tokenizer.encode("".join(self.turns)).ids]
            if len(tokens) <= room:
                return tokens
            if len(self.turns) == 1:
                return tokens[-room:]
            del self.turns[0]

    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Goes on from where the tokens differ from those in the caches."""
        same = next(
            (n for n, (a, b) in enumerate(zip(tokens, self.tokens, strict=False)) if a != b),
            min(len(tokens), len(self.tokens)),
        )
        kept = min(same, len(tokens) - 1)
        del self.tokens[kept:]
        for cache in self.caches:
            cache.length = kept
        if not kept:
            return self._feed(tokens)
        return [self._feed([token]) for token in tokens[kept:]][-1]

    def _feed(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits of what follows."""
        self.tokens += tokens
        logits: Tensor = self.model(torch.tensor([tokens]), self.caches)[0, -1]
        return logits
