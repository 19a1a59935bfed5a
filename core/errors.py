"""The one exception a user sees."""

from __future__ import annotations


class AdapterLabError(Exception):
    """Says what failed, what was found, what was expected and what to do next.

    The parts are kept apart so that a caller which knows more (the file, the module) can add it
    with :meth:`about` and still raise one readable sentence.
    """

    def __init__(self, failed: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        self.failed, self.found, self.expected, self.fix = failed, found, expected, fix
        super().__init__(failed)

    def about(self, subject: str) -> AdapterLabError:
        """The same error with what it is about (a file, a module) in front."""
        failed = f"{subject}: {self.failed}"
        return AdapterLabError(failed, found=self.found, expected=self.expected, fix=self.fix)

    def __str__(self) -> str:
        found = f"found {self.found}" if self.found else ""
        expected = f"expected {self.expected}" if self.expected else ""
        facts = ", ".join(filter(None, (found, expected)))
        sentence = f"{self.failed}: {facts}" if facts else self.failed
        return f"{sentence}. {self.fix}" if self.fix else f"{sentence}."
