"""A signature is taken if and only if a plain recursive reading of the specification takes it."""

from broker.wire.signature import BASIC, MAX_NESTING, MAX_SIGNATURE, is_signature, is_single_type


class _NotOneError(Exception):
    pass


def check(data: bytes) -> None:
    """Hold the invariant."""
    text = data.decode("latin-1")
    types = count_types(text)
    assert is_signature(text) is (types is not None)
    assert is_single_type(text) is (types == 1)


def count_types(text: str) -> int | None:
    """Return how many complete types a text is, None if it is no signature."""
    if len(text) > MAX_SIGNATURE:
        return None
    at = count = 0
    try:
        while at < len(text):
            at = _read_type(text, at, arrays=0, structs=0)
            count += 1
    except _NotOneError:
        return None
    return count


def _read_type(text: str, at: int, *, arrays: int, structs: int) -> int:
    if at >= len(text) or arrays > MAX_NESTING or structs > MAX_NESTING:
        raise _NotOneError
    code = text[at]
    if code in BASIC or code == "v":
        return at + 1
    if code == "a":
        if arrays == MAX_NESTING:
            raise _NotOneError
        if text[at + 1 : at + 2] == "{":
            return _read_entry(text, at + 2, arrays=arrays + 1, structs=structs)
        return _read_type(text, at + 1, arrays=arrays + 1, structs=structs)
    if code != "(":
        raise _NotOneError
    at = _read_type(text, at + 1, arrays=arrays, structs=structs + 1)
    while text[at : at + 1] != ")":
        at = _read_type(text, at, arrays=arrays, structs=structs + 1)
    return at + 1


def _read_entry(text: str, at: int, *, arrays: int, structs: int) -> int:
    if text[at : at + 1] not in BASIC or at >= len(text):
        raise _NotOneError
    at = _read_type(text, at + 1, arrays=arrays, structs=structs)
    if text[at : at + 1] != "}":
        raise _NotOneError
    return at + 1


def seeds() -> list[bytes]:
    """Return signatures with every code, and at the edges."""
    nested = [b"a" * 32 + b"y", b"(" * 32 + b"s" + b")" * 32, b"a" * 33 + b"y"]
    return [
        b"ybnqiuxtdsoghv",
        b"a{sa{oa(sv)}}(i(ss))",
        b"a{vs}",
        b"()",
        b"a{ssss}",
        b"y" * 256,
        *nested,
    ]
