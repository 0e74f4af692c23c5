"""Units of length, mass, volume, time and temperature, converted exactly."""

from __future__ import annotations

from fractions import Fraction

from minimind.environments.builtin.calculator import number_text

# Each unit's size in the first of its kind, and its names.
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "length": {
        "1": ("m", "metre", "metres", "meter", "meters", "米"), "1000": ("km", "kilometre", "kilometres", "kilometer",
        "kilometers", "千米", "公里"), "0.01": ("cm", "centimetre", "centimetres", "centimeter", "centimeters", "厘米"),
        "0.001": ("mm", "millimetre", "millimetres", "millimeter", "millimeters", "毫米"),
        "0.0254": ("inch", "inches", "英寸"), "0.3048": ("foot", "feet", "英尺"), "0.9144": ("yard", "yards", "码"),
        "1609.344": ("mile", "miles", "英里"),
    },
    "mass": {
        "1": ("g", "gram", "grams", "克"), "1000": ("kg", "kilogram", "kilograms", "千克", "公斤"),
        "0.001": ("mg", "milligram", "milligrams", "毫克"), "1000000": ("t", "tonne", "tonnes", "吨"),
        "28.349523125": ("ounce", "ounces", "盎司"), "453.59237": ("pound", "pounds", "磅"),
    },
    "volume": {
        "1": ("l", "litre", "litres", "liter", "liters", "升"),
        "0.001": ("ml", "millilitre", "millilitres", "milliliter", "milliliters", "毫升"),
        "3.785411784": ("gallon", "gallons", "加仑"),
    },
    "time": {
        "1": ("s", "second", "seconds", "秒"), "60": ("min", "minute", "minutes", "分钟"),
        "3600": ("h", "hour", "hours", "小时"), "86400": ("day", "days", "天"), "604800": ("week", "weeks", "周"),
    },
}  # fmt: skip
_TEMPERATURES = {
    "c": "c", "celsius": "c", "°c": "c", "摄氏度": "c", "f": "f", "fahrenheit": "f", "°f": "f", "华氏度": "f",
    "k": "k", "kelvin": "k", "开尔文": "k",
}  # fmt: skip
_UNITS = {
    name: (kind, Fraction(size)) for kind, sizes in _KINDS.items() for size, names in sizes.items() for name in names
}


def convert(value: float, unit: str, to: str) -> str:
    """A value in another unit."""
    amount, source, target = Fraction(str(value)), unit.strip().lower(), to.strip().lower()
    if source in _TEMPERATURES and target in _TEMPERATURES:
        return number_text(_temperature(amount, _TEMPERATURES[source], _TEMPERATURES[target]))
    for name in (source, target):
        if name not in _UNITS and name not in _TEMPERATURES:
            raise ValueError(f"the unit {name} is not known")
    if source not in _UNITS or target not in _UNITS or _UNITS[source][0] != _UNITS[target][0]:
        raise ValueError(f"{source} cannot be turned into {target}")
    return number_text(amount * _UNITS[source][1] / _UNITS[target][1])


def _temperature(value: Fraction, source: str, target: str) -> Fraction:
    zero, degree = Fraction("273.15"), Fraction(9, 5)
    kelvin = {"k": value, "c": value + zero, "f": (value - 32) / degree + zero}[source]
    return {"k": kelvin, "c": kelvin - zero, "f": (kelvin - zero) * degree + 32}[target]
