"""Nothing that the gate knows is forgotten in a hand-over: each field of its objects is handed over, or can be made again.

Whoever adds a field says here which it is; and if it is handed over, its class's `dump` and `load` have it.
"""

import ast
from pathlib import Path
from typing import Final

import pytest

GATE: Final = Path(__file__).resolve().parents[3] / "broker" / "gate"
# Given to the constructor, or made by it and never changed.
GIVEN: Final = """
_about _access_change _account _app _app_messages _budget _budgets _bus_messages _buses _changed _clock
_drained _driver _emit _failed _full _judging _least _loop _most _on_lost _on_request _owner _owners
_pending _rate _recorder _reports _sandbox _seconds _state _synced _turn _uid _verdicts _visibility
absent_name bus clock connector fd from_app id identity limits recorder reply_handlers sandbox sock state
"""
STATE: Final = """
app_takes_fds callers counts_callers greeting matches name_requests pending requested_names unique_name
"""
PENDING: Final = "calls_to_app calls_to_bus gate_serial translated_serials"
VERDICTS: Final = """
app_calls app_mute app_replies app_reply_at app_signals app_tables bus_calls bus_mute bus_refused bus_replies bus_reply_at
bus_signals bus_tables tables
"""
CONNECTION: Final = """
bus _bus_side _filter _guid _handshake _is_throttled _message_deadline _was_unfinished _watched
"""
SANDBOX: Final = """
_close_pipe _guid _listening _reason _throttle waiting_requests limited_log denied_count lingering
connections messages spec
"""
# File and class: what is handed over, and what is made again (sums, caches, what a turn of the loop begins with).
FIELDS: Final = {
    "filter/connection_state.py:ConnectionState": (STATE, "chores judge to_app to_bus verdicts"),
    "filter/pending_calls.py:PendingCalls": (PENDING, ""),
    "filter/verdict_cache.py:VerdictCache": ("", VERDICTS),
    "filter/subscriptions.py:Subscriptions": ("", "_counts _filed _spaces count"),
    "filter/name_owners.py:NameOwners": (
        "_asking _extra _matches _unasked _uses _when_known names waiting",
        "_histories views",
    ),
    "filter/owner_views.py:Views": ("", "_by_owner _bus _views"),
    "filter/visibility.py:NameVisibility": ("recently_visible", ""),
    "filter/access_change.py:AccessChange": ("known_to_app", "changing"),
    # All are done before anything is handed over.
    "filter/chores.py:Chores": ("", "_is_working _works room"),
    "filter/receive_buffer.py:ReceiveBuffer": (
        "_batches _fds _need _number _parts _skip unfinished",
        "_held",
    ),
    "filter/filter.py:Filter": (
        "_from_bus _stash _wake held yielded",
        "_stashed_bytes answered billed spent",
    ),
    "filter/from_bus.py:BusMessages": ("", "_arrives _cause _cost"),
    "filter/from_app.py:AppMessages": ("", ""),
    "filter/driver_calls.py:BusDriverCalls": ("", ""),
    "filter/bus_state.py:BusState": (
        "_guid _closed_recently _absent_name_errors address identities ledger name sandboxes broadcast_judges wants_instance_field",
        "_late_lists _late_rules barriers judges_names_alone lingering connections members payers gives_instance_field takes_fds tells_unique_names",
    ),
    "filter/payers.py:Payers": ("_arriving _late _movers", "_orphans budgets"),
    # As long as it is not known which bus it is, nobody has a name there: the file says the rest.
    "name_ledger.py:NameLedger": ("_path _spans", "_fd _folder _last_line _rumours _size _surplus"),
    "sandbox/lingering.py:LingeringConnection": ("_sock unique_name", "_ended _is_over"),
    "io/stream.py:SocketStream": (
        "_queue _reading",
        "_events _is_away _read_size _recvmsg _send handler is_behind is_clear queued queued_fds readable",
    ),
    # Repeating what was said makes the server and the client again.
    "sandbox/handshake.py:Handshake": (
        "_bus_side _deadline app_said bus_said",
        "_bus_sock _client _is_closed _server",
    ),
    "sandbox/connection.py:AppConnection": (
        CONNECTION,
        "_closed _does_chores_soon _meter _new_judge _resumes_soon",
    ),
    # A listening socket that was paused for want of descriptors tries again at once.
    "io/listener.py:ListeningSocket": ("sock spec", "_is_closed _is_paused"),
    "sandbox/meter.py:Meter": ("", "_asked _asks _budget answered ask_from counted"),
    "sandbox/budgets.py:MessageBudget": ("_filled caused left", ""),
    "sandbox/budgets.py:RateLimitedLog": ("_second suppressed suppressed_ever used", ""),
    "sandbox/denial_reports.py:DenialReports": ("left unreported", ""),
    "sandbox/throttle.py:Throttle": ("_waiting count is_throttled", "_is_stopped"),
    "sandbox/sandbox.py:Sandbox": (SANDBOX, "_is_preparing _judges bytes_held is_over lost"),
    "supervisor_channel.py:SupervisorChannel": (
        "_journal _listening _reader _requests _stream",
        # A request that takes more than a turn is done before the next one, which hands over, is looked at.
        "_most_unread is_busy",
    ),
    "server.py:Gate": (
        "_bus_clients _channel _sandboxes",
        "_container_servers _folder _id_queries _instance_fields _service",
    ),
}


def fields_of(name: str) -> set[str]:
    """Return what the methods of a class assign to `self`."""
    module, _, wanted = name.partition(":")
    tree = ast.parse((GATE / module).read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == wanted]
    return {
        node.attr
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_handed_over_or_made_again(name: str) -> None:
    handed, made = (set(names.split()) for names in FIELDS[name])
    assert not handed & made
    given = set(GIVEN.split())
    assert fields_of(name) - given == (handed | made) - given
