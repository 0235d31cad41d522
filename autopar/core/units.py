"""Seconds, bytes and counts as people read them; the only place where units are converted."""

GIB = 2**30


def seconds_text(time_s: float) -> str:
    """
    >>> seconds_text(12.345), seconds_text(0.01234), seconds_text(4.2e-6), seconds_text(0)
    ('12.35 s', '12.3 ms', '4.2 us', '0 s')
    """
    if time_s == 0:
        return "0 s"
    if time_s >= 1:
        return f"{time_s:,.2f} s"
    if time_s >= 1e-3:
        return f"{time_s * 1e3:.1f} ms"
    return f"{time_s * 1e6:.1f} us"


def gib_text(size_bytes: float) -> str:
    """
    >>> gib_text(3 * 2**29)
    '1.50 GiB'
    """
    return f"{size_bytes / GIB:,.2f} GiB"


def count_text(count: float) -> str:
    """
    >>> count_text(39_134_000_000), count_text(124_400_000), count_text(512)
    ('39.1 B', '124.4 M', '512')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:g}"


def flops_text(count: float) -> str:
    """
    >>> flops_text(2.5e14), flops_text(3.1e9)
    ('250.0 TFLOP', '3.1 GFLOP')
    """
    return f"{count / 1e12:,.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:,.1f} GFLOP"


def percent_text(fraction: float) -> str:
    """
    >>> percent_text(0.4567)
    '45.7 %'
    """
    return f"{100 * fraction:.1f} %"


def bar_text(fraction: float, width: int) -> str:
    """A bar of ``width`` characters; what exceeds the budget ends in ``!``.

    >>> bar_text(0.5, 8), bar_text(1.2, 8)
    ('####....', '#######!')
    """
    if fraction > 1:
        return "#" * (width - 1) + "!"
    filled = round(fraction * width)
    return "#" * filled + "." * (width - filled)


def ranges_text(numbers: list[int]) -> str:
    """Sorted numbers with runs folded.

    >>> ranges_text([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
