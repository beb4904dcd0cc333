"""What comes in order, some at a time."""

import pytest

from saelens_ext.ops.groups import groups, mapped


@pytest.mark.parametrize(("size", "expected"), [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3]]), (9, [[0, 1, 2, 3]])])
def test_groups_are_read_when_they_are_asked_for(size, expected):
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number

    found = []
    for group in groups(items(), size):
        found.append([])
        for item in group:
            found[-1].append(item)
            assert made[-1] == item, "no item is made before it is its turn"
    assert found == expected == list(mapped(items(), list, size))


def test_work_is_done_where_the_blocks_are():
    class There:
        def mapped(self, work, size=1):
            yield ("there", work(iter("ab")), size)

        def __iter__(self):
            raise AssertionError("nothing is brought here")

    assert list(mapped(There(), list, 2)) == [("there", ["a", "b"], 2)]
