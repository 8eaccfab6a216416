"""Pages: never held by strangers, found by equal texts alone, forgotten in their order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_from_scratch.generate.pages import ROOT, Pages

SIZE = 2
COUNT = 9


def test_a_page_behind_the_last_one_is_preferred() -> None:
    pages = Pages(5, SIZE)
    assert [pages.take(), pages.take(), pages.take(2)] == [1, 2, 3]
    pages.release(1)
    assert pages.take(3) == 4
    assert pages.take(4) == 1
    assert pages.take() is None


def test_the_pages_used_longest_ago_are_taken_first() -> None:
    pages = Pages(4, SIZE)
    held = [pages.take() for _ in range(3)]
    for token, page in enumerate(held):
        assert page is not None
        pages.remember(ROOT, [token, token], page)
    for page in (2, 1, 3):
        pages.release(page)
    assert pages.find([2, 2, 9])[0] == [3]  # used again
    pages.release(3)
    assert [pages.take() for _ in range(3)] == [2, 1, 3]
    assert pages.find([2, 2, 9]) == ([], ROOT)


def test_what_follows_a_forgotten_page_is_not_found() -> None:
    pages = Pages(3, SIZE)
    serial = pages.remember(ROOT, [1, 1], pages.take() or 0)
    pages.remember(serial, [2, 2], pages.take() or 0)
    pages.release(1)
    pages.release(2)
    assert pages.take() == 1  # page 2 is known yet, but not where it begins
    pages.release(1)
    assert pages.find([1, 1, 2, 2, 9]) == ([], ROOT)
    pages.remember(ROOT, [1, 1], pages.take() or 0)
    assert pages.find([1, 1, 2, 2, 9])[0] == [1]


def test_taking_out_of_turn_for_ever_costs_no_memory() -> None:
    pages = Pages(20, SIZE)
    first = pages.take()
    for _ in range(1000):
        page = pages.take(first)
        assert page == 2
        pages.release(page)
    assert len(pages._free) <= 2 * 20 + 1
    assert {pages.take() for _ in range(18)} == set(range(2, 20))


class Texts(RuleBasedStateMachine):
    """Texts begin, grow, and end at random; beside each page stands what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(COUNT, SIZE)
        self.content: dict[int, list[int]] = {}
        self.texts: list[tuple[list[int], list[int], int, int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens: list[int]) -> None:
        table, serial = self.pages.find(tokens)
        found = [token for page in table for token in self.content[page]]
        assert found == tokens[: len(found)]
        assert len(found) < len(tokens)
        known = len(table)
        while len(table) * SIZE < len(tokens):
            page = self.pages.take(table[-1] if table else None)
            if page is None:
                for one in table:
                    self.pages.release(one)
                return
            assert not any(page in other for _, other, _, _ in self.texts)
            table.append(page)
            at = (len(table) - 1) * SIZE
            self.content[page] = tokens[at : at + SIZE]
        for place in range(known, len(tokens) // SIZE):
            own = tokens[place * SIZE : (place + 1) * SIZE]
            serial = self.pages.remember(serial, own, table[place])
        self.texts.append((tokens, table, known, serial))
        again, _ = self.pages.find([*tokens, 0, 0])
        assert len(again) >= len(tokens) // SIZE  # what was made known is found
        for one in again:
            self.pages.release(one)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.texts) - 1))
        for page in reversed(self.texts.pop(place)[1]):
            self.pages.release(page)

    @invariant()
    def every_page_is_counted_once(self) -> None:
        held = {page for _, table, _, _ in self.texts for page in table}
        assert self.pages.held == len(held)
        assert self.pages.available == COUNT - 1 - len(held)
        assert 0 not in held

    @invariant()
    def texts_are_where_they_were_put(self) -> None:
        for tokens, table, _, _ in self.texts:
            assert [token for page in table for token in self.content[page]] == tokens


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
