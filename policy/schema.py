"""The JSON Schema of policy files, for editors: completion and first errors. What it accepts may still be refused by `load`."""

from __future__ import annotations

from typing import Any, Final

from policy.fields import SINKS
from policy.language import RULE_KEYS, TOP, VERSION
from policy.selectors import NAME

_TEXT: Final[dict[str, Any]] = {"type": "string", "minLength": 1}
_REF: Final = "#/$defs/"


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required or [],
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF + name}


def _one_or_more(items: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [items, {"type": "array", "items": items, "minItems": 1}]}


def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    rule_fields = {
        "id": _TEXT | {"description": "unique over the whole policy"},
        "from": _ref("selector"), "to": _ref("selector"), "on": _ref("ports"), "why": _TEXT,
        "when": _object({"cron": _TEXT, "for": _ref("duration"), "tz": _TEXT}, ["cron", "for"]),
        "mode": _ref("mode"), "max_rate": {"type": "string", "pattern": "^[0-9]{1,9}[kMG]?bit(/s)?$"},
        "idle_timeout": _ref("duration") | {"description": "a TCP or UDP flow that carried nothing for so long is ended; of an allow"},
    }  # fmt: skip
    assert set(rule_fields) == RULE_KEYS
    rule = _object(rule_fields, ["id", "from", "to", "on"])
    guardrail = _object(rule_fields, ["from", "to"])
    grant_fields = {k: v for k, v in rule_fields.items() if k not in {"when", "mode"}}
    grant = _object(
        grant_fields
        | {
            "not_before": _ref("instant"), "not_after": _ref("instant"), "until": _object({"workload_ends": _TEXT}, ["workload_ends"]),
            "approved_by": _one_or_more(_TEXT),
        },
        ["id", "from", "to", "on"],
    )  # fmt: skip
    segment = _object(
        {
            "name": _TEXT, "members": _ref("selector"),
            "mode": _ref("mode"),
            "budget": _object({"rules": {"type": "integer", "minimum": 1}, "unused_ratio": {"type": "number", "minimum": 0, "maximum": 1}}),
            "allow": _list(rule), "deny": _list(rule), "sensitive": {"type": "boolean"}, "why": _TEXT,
            "alert": _object({"on_deny": {"enum": sorted(SINKS)}, "collapse": _ref("duration")}, ["on_deny"]),
            "idle_timeout": rule_fields["idle_timeout"],
        },
        ["name"],
    )  # fmt: skip
    consent = {"from": _ref("selector"), "to": _ref("selector"), "on": _ref("ports"), "why": _TEXT}
    flow_test = _object(
        {"from": _ref("selector"), "to": _ref("selector"), "on": _ref("ports"), "expect": {"enum": ["allow", "deny"]}, "by": _TEXT,
         "at": _ref("instant"), "why": _TEXT},
        ["from", "to", "expect"],
    )  # fmt: skip
    depth = {"anyOf": [{"const": "any"}, {"type": "integer", "minimum": 1}]}
    reach_test = _object(
        {"reach": _ref("selector"), "never": _ref("selector"), "depth": depth, "why": _TEXT},
        ["reach", "never"],
    )
    replay_test = _object({"replay": _TEXT, "max_new_denied": {"type": "integer", "minimum": 0}}, ["replay"])
    properties = {
        "meshpolicy": {"const": VERSION},
        "scope": _TEXT,
        "owners": _one_or_more(_TEXT),
        "review": _object(
            {"approvals": {"type": "integer", "minimum": 1}, "paths": _list(_TEXT)}, ["approvals"]
        ),
        "labels": _object(
            {
                "keys": {
                    "anyOf": [_list(_TEXT), {"type": "object", "additionalProperties": _one_or_more(_TEXT)}]
                }
            },
            ["keys"],
        ),
        "groups": _named(_ref("selector")),
        "services": _named(_ref("ports")),
        "guardrails": _list(
            {"oneOf": [_object({"deny": guardrail}, ["deny"]), _object({"pass": guardrail}, ["pass"])]}
        ),
        "segments": _list(segment),
        "grants": _list(grant),
        "offers": _list(_object(consent, ["to", "on"])),
        "accepts": _list(_object(consent, ["from", "on"])),
        "idle": _object({"keep_membership": _ref("duration"), "on_return": {"const": "reattest_then_current_policy"}}),
        "tests": _list({"anyOf": [flow_test, reach_test, replay_test]}),
    }
    assert set(properties) == TOP
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Retinue policy",
        **_object(properties, ["meshpolicy"]),
        "$defs": {
            "selector": {
                "description": 'a group name, "*" for everybody inside, labels such as {app: shop}, or not, any, all, workload, under; in `from` also spiffe://OTHER.EXAMPLE/PATH or /*, and in `from` of an allow also process: uid:N, unit:NAME or cgroup:/PATH',
                "anyOf": [_TEXT, {"type": "object", "minProperties": 1}, {"type": "array", "minItems": 1, "items": _ref("selector")}],
            },
            "ports": _one_or_more(_TEXT | {"description": "tcp/443, tcp/8000-8010, udp, icmp, any, or a service name"}),
            "mode": {
                "description": "draft: tested, never in force; audit: forwarded and recorded until a date; enforce",
                "anyOf": [{"enum": ["draft", "enforce"]}, _object({"audit_until": _ref("instant")}, ["audit_until"])],
            },
            "duration": {"type": "string", "pattern": "^[0-9]+[smhdw]$"},
            "instant": {"type": "string", "description": "2031-02-11T18:00Z or 2031-02-11"},
        },
    }  # fmt: skip


def _named(value: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "propertyNames": {"pattern": f"^{NAME.pattern}$"},
        "additionalProperties": value,
    }
