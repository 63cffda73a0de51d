"""api.toml is read whole or refused with file, line, column, the key or value, and what was probably meant."""

from __future__ import annotations

import pytest

from luacell.protocol.api import Array, Enum, Ptr, StringView, Struct, Void, parse
from luacell.protocol.api.model import API_SIZE_MAX, FIELDS_MAX
from luacell.protocol.api.tables import PROBLEMS_MAX
from luacell.protocol.errors import ApiError, LuacellError
from luacell.protocol.identity import GuestContractId, HostContractId, Version
from tests.support.apis import svc

FULL = '''
docs = { summary = "All.", more = "Of it.", langs = 1 }
[langs.rust]
attributes = ["x"]

[[types]] # a comment
name = "Line"
"docs" = """
Two "points".
"""
[[types.fields]]
name = "ends"
type = "Array< Point >"
[types.fields.langs.lua]
attributes = []
[[types.fields]]
name = 'to'
type = "ptr"

[[types]]
name = "Point"
fields = [
  { name = "x", type = "f32", docs = "across" }, # first
  { name = "y", type = "f32" },
]

[[enum]]
name = "Bits"
repr = "u8"
variants = [{ name = "A", value = "0b1" }, { name = "B", value = "(A | 0x2) << 1" }, { name = "C", value = "~B" },
            { name = "D", value = "~~7 | A<<4" }]

[[host_contract]]
name = "host.lines"
version = "2.1"
singleton = true
docs = "Lines."
[[host_contract.functions]]
name = "draw"
docs = "Draw."
return = { type = "Line", docs = "what was drawn" }
[[host_contract.functions.params]]
name = "line"
type = "Line"
[[host_contract.functions]]
name = "clear"
return = "void"

[[guest_contract]]
name = "pipeline.Decoder"
version = "1"
[[plugin_contract]]
name = "data.Reporter"
version = "3.0.1"
'''


def error_of(text: str) -> str:
    with pytest.raises(ApiError) as caught:
        parse(text, "api.toml")
    assert isinstance(caught.value, LuacellError)
    assert str(caught.value).startswith(f"api.toml:{caught.value.line}:{caught.value.column}: ")
    return str(caught.value).removeprefix("api.toml:")


def test_everything_that_a_description_may_say_is_read() -> None:
    api = parse(FULL, "api.toml")
    line, point = api.structs
    assert api.docs == "All.\n\nOf it."
    assert (line.name, line.docs, point.fields[0].docs) == ("Line", 'Two "points".', "across")
    assert line.fields[0].type == Array(point)
    assert line.fields[0].type.name == "Array<Point>"
    assert line.fields[1].type == Ptr()
    assert [variant.value for variant in api.enums[0].variants] == [1, 6, 0xF9, 0x17]
    assert api.enums[0].mask == 0xFF
    (contract,) = api.host_contracts
    assert (contract.name, contract.version, contract.singleton) == ("host.lines", Version(2, 1), True)
    assert contract.id == HostContractId("host.lines", 2)
    draw, clear = contract.functions
    assert (draw.id, draw.docs, draw.result, draw.result_docs) == (0, "Draw.", line, "what was drawn")
    assert (clear.id, clear.params, clear.result) == (1, (), Void())
    assert contract.function("clear") is clear
    assert contract.function("none") is None
    assert str(contract) == "host.lines@2"
    assert [guest.id for guest in api.guest_contracts] == [
        GuestContractId("pipeline.Decoder", 1),
        GuestContractId("data.Reporter", 3),
    ]


def test_known_contract_and_empty_description_are_read() -> None:
    api = svc()
    assert isinstance(api.structs[0].fields[2].type, StringView)
    assert isinstance(api.structs[0].fields[3].type, Struct)
    assert isinstance(api.enums[0], Enum)
    assert parse("\r\n", "api.toml").structs == ()


TYPE = '[[types]]\nname = "A"\n'
FIELD = TYPE + "fields = [{{ name = {}, type = {} }}]"
ENUM = '[[enum]]\nname = "E"\nrepr = "u8"\n'
VARIANT = ENUM + 'variants = [{{ name = "A", value = "1" }}, {{ name = {}, value = {} }}]'
HOST = '[[host_contract]]\nname = "host.a"\nversion = "1"\n'
PARAM = HOST + '[[host_contract.functions]]\nname = "f"\nparams = [{{ name = {}, type = {} }}]'
ALL_PARENTHESES = '"' + "(" * 33 + "1" + ")" * 33 + '"'
REFUSED = [
    ("x = ", "1:5: no TOML: Invalid value"),
    ("[[types]]\nname = 1 1\n", "2:10: no TOML: "),
    ("a = " + "[" * 5000, "1:1: arrays or tables are nested too deeply"),
    ("a = " + "9" * 5000, "1:5005: no TOML: "),
    ("#" * (API_SIZE_MAX + 1), f"1:1: a description of {API_SIZE_MAX + 1} bytes; the limit is {API_SIZE_MAX}"),
    ("[[typs]]\nname = 1\n", "1:3: unknown key 'typs'; did you mean 'types'?"),
    ("[[types]]\nNAME = 1\n", "2:1: unknown key 'NAME'; did you mean 'name'?"),
    ('[[types]]\n"q\\u0071" = 1\n', "2:1: unknown key 'qq'; known are docs, fields, langs, name"),
    ("types = 1", "1:9: types is an integer, not an array of tables"),
    ("types = [2020-01-01 10:00:00]", "1:10: types[0] is a date or time, not a table"),
    ("[[types]]\nfields = []", "1:1: lacks the key 'name'"),
    ("[[types]]\nname = 5", "2:8: name is an integer, not a text"),
    ("docs.a = 'x'\ntypos.b = 5", "2:1: unknown key 'typos'; did you mean 'types'?"),
    ("langs = 5", "1:9: langs is an integer, not a table"),
    ("docs = 1.5", "1:8: docs is a float, not a text or a table"),
    ('docs = "\\u001b[2J"', "1:8: docs hold the control character '\\x1b'"),
    ('[[types]]\nname = "a-b"', "2:8: name 'a-b' is no identifier; write letters, digits and _"),
    (f'[[types]]\nname = "{"a" * 129}"', "2:8: name has 129 characters; the limit is 128"),
    ('[[types]]\nname = "u8"', "2:8: name 'u8' is reserved"),
    ('[[types]]\nname = "Array"', "2:8: name 'Array' is reserved"),
    (TYPE, "1:1: lacks the key 'fields'"),
    (TYPE + "fields = []", "3:10: fields is empty; it needs at least one"),
    (TYPE + f"fields = [{'{},' * (FIELDS_MAX + 1)}]", f"3:10: {FIELDS_MAX + 1} fields; the limit is {FIELDS_MAX}"),
    (FIELD.format('"end"', '"u8"'), "3:20: name 'end' is reserved: a keyword of Lua"),
    (FIELD.format('"and"', '"u8"'), "3:20: name 'and' is reserved: a keyword of Lua and Python"),
    (FIELD.format('"class"', '"u8"'), "3:20: name 'class' is reserved: a keyword of Python"),
    (FIELD.format('"__index"', '"u8"'), "3:20: name '__index' is reserved: two underscores"),
    (FIELD.format('"a"', '"Void"'), "3:32: type 'Void' is only for returns, not for a field"),
    (FIELD.format('"a"', '"StringVew"'), "3:32: unknown type 'StringVew'; did you mean 'StringView'?"),
    (FIELD.format('"a"', '"A"'), "3:32: type 'A' makes a struct recursive: A -> A"),
    (FIELD.format('"a"', '"Array<A>"'), "3:32: type 'A' makes a struct recursive: A -> A"),
    (FIELD.format('"a"', '"Array<Void>"'), "3:32: type 'Array<Void>': an array holds no Void"),
    (FIELD.format('"a"', '"Array<Array<u8>>"'), "3:32: type 'Array<Array<u8>>' is malformed; write Array<T>"),
    (FIELD.format('"a", typ', '"u8"'), "3:28: no TOML: "),
    (
        TYPE + 'fields = [{ name = "b", type = "Array<B>" }]\n[[types]]\nname = "B"\n'
        'fields = [{ name = "c", type = "Array<u8>" }]',
        "3:32: type 'Array<B>': its items hold an Array; arrays are of one level",
    ),
    (
        TYPE + 'fields = [{ name = "b", type = "B" }]\n[[types]]\nname = "B"\nfields = [{ name = "a", type = "A" }]',
        "6:32: type 'A' makes a struct recursive: A -> B -> A",
    ),
    (
        TYPE + 'fields = [{ name = "b", type = "u8" },\n  { name = "b", type = "u8" }]',
        "4:12: duplicate field 'b'; the first is in line 3",
    ),
    (
        FIELD.format('"a"', '"u8"') + '\n[[enum]]\nname = "A"',
        "5:8: duplicate type 'A'; the first is in line 1",
    ),
    (ENUM.replace("u8", "i8"), "3:8: repr 'i8' is none of u8, u16, u32, u64"),
    (ENUM + "bitflag = 1\nvariants = [{ name = 'A', value = '1' }]", "4:11: bitflag is an integer, not true or false"),
    (VARIANT.format('"A"', '"1"'), "4:51: duplicate variant 'A'; the first is in line 4"),
    (VARIANT.format('"mro"', '"1"'), "4:51: name 'mro' is reserved"),
    (VARIANT.format('"_x_"', '"1"'), "4:51: name '_x_' is reserved: no Python enum"),
    (VARIANT.format('"B"', '"256"'), "4:64: value '256': 0x100 is outside 0..0xff of u8"),
    (VARIANT.format('"B"', '"1 << 8"'), "4:70: value '1 << 8': shifts by 8; u8 has 8 bits"),
    (VARIANT.format('"B"', '"A | Bee"'), "4:69: value 'A | Bee': 'Bee' is no earlier variant"),
    (VARIANT.format('"B"', '"a"'), "4:64: value 'a': 'a' is no earlier variant"),
    (VARIANT.format('"B"', '"0x"'), "4:64: value '0x': '0x' is no number, variant or operator"),
    (VARIANT.format('"B"', '"A A"'), "4:67: value 'A A': 'A' in place of an operator"),
    (VARIANT.format('"B"', '"(1"'), "4:67: value '(1': the end in place of a closing parenthesis"),
    (VARIANT.format('"B"', '""'), "4:64: value '': the end in place of a number"),
    (VARIANT.format('"B"', ALL_PARENTHESES), "4:97: value '(((((("),
    (VARIANT.format('"B"', f'"{"1" * 1025}"'), "4:64: value '111111"),
    (HOST.replace("host.a", "other.a"), "2:8: host contract name 'other.a' lacks the prefix 'host.'"),
    (HOST.replace('"1"', '"1.65536"'), "3:11: version minor 65536 is outside 0..65535"),
    (HOST + HOST, "5:8: duplicate contract 'host.a@1'; the first is in line 1"),
    (HOST.replace("host_", "guest_") + "singleton = true", "4:1: unknown key 'singleton'"),
    (PARAM.format('"self"', '"u8"'), "6:20: name 'self' is reserved"),
    (PARAM.format('"a"', '"void"'), "6:32: type 'void' is only for returns, not for a parameter"),
    (PARAM.format('"a", type = "u8" }, { name = "a"', '"u8"'), "6:49: duplicate parameter 'a'"),
    (PARAM.format('"a"', '"u8"') + "\nreturn = 5", "7:10: return is an integer, not the name of a type or"),
]


@pytest.mark.parametrize(("text", "error"), REFUSED, ids=[error for _, error in REFUSED])
def test_wrong_description_is_refused_with_its_place(text: str, error: str) -> None:
    assert any(line.startswith(error) for line in error_of(text).replace("\napi.toml:", "\n").split("\n"))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    text = """typs = 1
docs = "\\u0007"
langs = 1
[[types]]
name = "u8"
fields = [{ name = "end", type = "Strin" }, 5, { name = "b", type = "A" }, { name = "b", typ = "u8" }]
[[types]]
name = "A"
fields = [{ name = "e", type = "E" }, { name = "a", type = "A" }]
[[types]]
name = "A"
fields = []
[[types]]
name = "n-m"
fields = 1
[[enum]]
name = "E"
repr = "u9"
bitflag = 0
variants = [{ name = "A", value = "2 +" }, { name = "B", value = "A | 1" }, { name = "_", value = 1 }]
[[host_contract]]
name = "logger"
version = "1.2.3.4"
singleton = "no"
[[host_contract.functions]]
name = "f"
params = [{ name = "self", type = "n-m" }, { name = "b", type = "Void" }]
return = "A"
[[host_contract.functions]]
name = "f"
return = { type = "B" }
[[guest_contract]]
name = "x.y"
version = "99999999999"
"""
    with pytest.raises(ApiError) as caught:
        parse(text, "api.toml")
    lines = [line.removeprefix("api.toml:") for line in str(caught.value).split("\n")]
    assert [line.split(": ")[0] for line in lines] == [
        *("1:1", "2:8", "3:9"),
        *("5:8", "6:20", "6:34", "6:45", "6:76", "6:85", "6:90", "9:60", "11:8", "12:10", "14:8", "15:10"),
        *("18:8", "19:11", "20:38", "20:86", "20:99"),
        *("22:8", "23:11", "24:13", "27:20", "27:65", "30:8", "31:19", "34:11"),
    ]
    assert (caught.value.line, caught.value.column, len(caught.value.others)) == (1, 1, len(lines) - 1)


def test_what_follows_from_a_broken_declaration_is_not_told() -> None:
    broken_variant = ENUM + 'variants = [{ name = "A", value = "1 1" }, { name = "end", value = "A" }]\n'
    assert error_of(broken_variant + TYPE.replace("A", "B") + 'fields = [{ name = "e", type = "E" }]').count("\n") == 1
    assert error_of(
        TYPE.replace("A", "a b") + 'fields = [{ name = "x", type = "u8" }]\n' + FIELD.format('"y"', '"a b"')
    )
    assert error_of(chain(14, fields=2)).count("\n") == 0


def test_of_very_many_problems_the_first_are_told() -> None:
    lines = error_of("\n".join(f"wrong{number} = 1" for number in range(250))).split("\n")
    assert len(lines) == PROBLEMS_MAX + 1
    assert lines[-1] == "api.toml:100:1: and 150 more"


def test_functions_differ_by_name() -> None:
    function = '[[host_contract.functions]]\nname = "f"\n'
    assert error_of(HOST + function * 2) == "7:8: duplicate function 'f'; the first is in line 4"


def chain(count: int, fields: int = 1) -> str:
    """Structs that each hold the next."""
    lines = []
    for number in range(count):
        type_ = f"S{number + 1}" if number < count - 1 else "u8"
        members = ", ".join(f'{{ name = "f{index}", type = "{type_}" }}' for index in range(fields))
        lines.append(f'[[types]]\nname = "S{number}"\nfields = [{members}]')
    return "\n".join(lines)


def test_structs_nest_only_so_deep_and_so_wide() -> None:
    assert len(parse(chain(16), "api.toml").structs) == 16
    assert "more than 16 structs are nested" in error_of(chain(17))
    blocks = ["[[types]]" + block for block in chain(17).split("[[types]]")[:0:-1]]
    assert "17 structs are nested; the limit is 16" in error_of("\n".join(blocks))
    assert "4096 scalars and pointers in all; the limit is 2048" in error_of(chain(12, fields=2))
