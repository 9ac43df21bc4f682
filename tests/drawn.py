"""What hypothesis puts where a file should hold something else."""

from hypothesis import strategies as st

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, "hip", "preset", "0"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(inside, way=()):
    """The way to every value of a JSON tree."""
    yield way
    if isinstance(inside, list):
        inside = dict(enumerate(inside))
    for key, one in inside.items() if isinstance(inside, dict) else ():
        yield from places(one, (*way, key))
