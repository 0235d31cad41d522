"""Seconds, bytes and counts as people read them; the only place where units are converted."""

GIB = 2**30


def seconds_text(time_s: float) -> str:
    """Seconds in s, ms or us.

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
    """Bytes in GiB (2^30).

    >>> gib_text(3 * 2**29)
    '1.50 GiB'
    """
    return f"{size_bytes / GIB:,.2f} GiB"


def count_text(count: float) -> str:
    """A count in thousands, millions, ... with its letter.

    >>> count_text(39_134_000_000), count_text(124_400_000), count_text(512)
    ('39.1 B', '124.4 M', '512')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:g}"


def flops_text(count: float) -> str:
    """FLOPs in units of 1e12 or 1e9.

    >>> flops_text(2.5e14), flops_text(3.1e9)
    ('250.0 TFLOP', '3.1 GFLOP')
    """
    return f"{count / 1e12:,.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:,.1f} GFLOP"


def percent_text(fraction: float) -> str:
    """A fraction in per cent.

    >>> percent_text(0.4567)
    '45.7 %'
    """
    return f"{100 * fraction:.1f} %"


def bar_text(fraction: float, width: int) -> str:
    """A bar of ``width`` characters; a fraction above 1 fills it and ends in ``!``.

    >>> bar_text(0.5, 8), bar_text(1.2, 8)
    ('####....', '#######!')
    """
    if fraction > 1:
        return "#" * (width - 1) + "!"
    filled = round(fraction * width)
    return "#" * filled + "." * (width - filled)


def ranges_text(numbers: list[int]) -> str:
    """The distinct numbers in order, consecutive ones as a range.

    >>> ranges_text([0, 1, 2, 5])
    '0-2, 5'
    """
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
