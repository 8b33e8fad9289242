"""The requests of one shell: shows them below their cells and assigns replies to variables."""

from __future__ import annotations

import os
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from nbcodex import host
from nbcodex.client import get_client
from nbcodex.errors import Stopped, shorten
from nbcodex.events import Ending, Failed
from nbcodex.journal.journal import Journal
from nbcodex.models import MapListener, Origin, Reply
from nbcodex.notebook import cell_options, display, identity, variables
from nbcodex.notebook.config import Codex
from nbcodex.notebook.display import CellOutput, OutputOptions, can_show_widgets, text_views
from nbcodex.notebook.display.panel import ActionName, PanelState
from nbcodex.notebook.monitor import collector_of
from nbcodex.notebook.variables import CallerScope
from nbcodex.rendering import formats
from nbcodex.rendering.figures import join_figures
from nbcodex.requests.conversation import MAIN_THREAD
from nbcodex.requests.handle import Handle, PendingReply, reply_or_raise, run_uninterrupted
from nbcodex.requests.options import build_request
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

MAX_HEADING_CHARS = 80


class Session:
    """Runs requests of one shell with the settings in force, and shows their answers."""

    def __init__(
        self, shell: InteractiveShell, config: Codex, scope: CallerScope | None = None
    ) -> None:
        self.shell, self.config, self.caller_scope = shell, config, scope or CallerScope(names={})
        self._pid = os.getpid()
        # From here on, `nbcodex.ask` and `nbcodex.map` use this notebook's settings and display.
        host.current.settings = config.settings
        host.current.follow = self._follow_ask
        host.current.origin = self.new_origin
        host.current.map_listener = self.map_listener
        host.current.confirm = host.confirm
        host.current.is_script = False
        self.settings: Settings = config.settings()
        collector_of(get_client())  # the monitor collects events from the first request on

    @property
    def notebook(self) -> str:
        """The notebook that journal entries belong to."""
        return identity.notebook_id(self.shell)

    @property
    def journal(self) -> Journal:
        """The journal that the settings name."""
        return get_client().journal(self.settings)

    def unfinished_ids(self, notebook: str | None) -> list[str]:
        """Return the ids of what is parked or abandoned in a notebook, or in all."""
        ids = [entry.id for entry in self.journal.resumable_entries(notebook=notebook)]
        return ids + [f"map {map_id}" for map_id in self.journal.maps.unfinished(notebook=notebook)]

    def report_unfinished(self) -> None:
        """Print in one line which requests and maps of this notebook can be resumed."""
        if ids := self.unfinished_ids(self.notebook):
            listed = ", ".join(ids[:3]) + (" …" if len(ids) > 3 else "")
            them = "it" if len(ids) == 1 else "them"
            print(
                f"{len(ids)} parked or abandoned here ({listed}): `%codex resume` resumes {them}, "
                f"`%codex journal` lists {them}."
            )
        elif self.journal.problem:
            print(self.journal.problem)  # because entries may exist that could not be read

    def run_cell(self, args: Namespace, cell: str) -> None:
        """Answer the prompt of a cell with the options `args`."""
        __tracebackhide__ = True
        text = cell.removesuffix("\n")
        names = variables.user_variables(self.shell, self.caller_scope)
        option_notes = cell_options.fill_options(args, names)
        if args.eval:
            prompt = variables.run_for_prompt(self.shell, cell, self.caller_scope)
        elif args.raw:
            prompt = variables.FilledPrompt(text)
        else:
            prompt = variables.fill(
                text, variables.user_variables(self.shell, self.caller_scope, text)
            )
        # A schema may be defined in a startup file of IPython, whose variables `names` leaves out.
        schemas = {**self.shell.user_ns, **self.caller_scope.names}
        options, format_ = cell_options.request_options(args, schemas)
        thread = MAIN_THREAD if args.thread is None else args.thread
        request = build_request(
            prompt.text,
            self.settings,
            replace(
                options,
                thread=None if args.no_history else thread,
                images=[
                    *prompt.images,
                    *variables.images_of(args.image, self.shell, self.caller_scope),
                ],
            ),
            origin=self.new_origin(args.out),
        )
        # Joined last: a prompt that fails before must leave the conversation unchanged.
        request, turn_notes = get_client().conversations.join(
            request, self.journal.conversations, self.settings, start_new=args.new
        )
        notes = [*option_notes, *prompt.notes, *turn_notes]
        output = OutputOptions(format=format_, notes=notes)
        if args.dry_run:
            estimating = get_client().estimate(request, self.settings)
            model, estimate, caps_left = event_loop.run(estimating)
            cost = "" if estimate.cost else "cost unknown"
            figures = [shorten(model or "", 80), str(estimate), cost, *caps_left, *notes]
            print(f"Dry run, nothing was sent: {join_figures(*figures)}")
            return
        handle = get_client().create_handle(request, self.settings)
        if args.background:
            self.answer_in_background(handle, output)
        else:
            self.show_answer(handle, output)

    def show_answer(
        self, handle: Handle, options: OutputOptions, *, earlier_text: str = ""
    ) -> None:
        """Show a request until it ends, and assign its variable; raise if it got no answer."""

        def assign(reply: Reply) -> None:
            # The text of an earlier attempt is kept if this one ends without any.
            if earlier_text and not reply.text and reply.status != "done":
                reply = replace(reply, text=earlier_text)
            self.assign(handle.request.origin.variable, reply)

        ending = self._show_until_end(handle, self._create_output(handle, options), on_end=assign)
        reply = reply_or_raise(ending, handle.request)
        blocks = formats.code_blocks(reply) if options.format in {"code", "fix"} else []
        # Never run. If the code may be incomplete, the output says why there is no new cell.
        if blocks and not blocks[0].problem:
            self.shell.set_next_input(blocks[0].code, replace=False)

    def answer_in_background(self, handle: Handle, options: OutputOptions) -> None:
        """Run a request while other cells run; its answer is shown in this cell."""
        if options.format == "code":
            # From another thread than the cell's, IPython would insert the new cell below whichever
            # cell runs by then.
            notes = [*options.notes, "`%codex insert` puts it into a cell"]
            options = replace(options, notes=notes)
        pending, name = PendingReply(handle), handle.request.origin.variable
        if name:
            for namespace in self._namespaces():
                namespace[name] = pending
        self.config.last_reply = pending
        output = self._create_output(handle, replace(options, background=True))
        output.show()

        def assign(reply: Reply) -> None:
            # A value that the user has assigned meanwhile stays.
            for namespace in self._namespaces():
                if name and namespace.get(name) is pending:
                    namespace[name] = reply

        follow = partial(self._show_until_end, handle, output, on_end=assign)
        handle.start()
        threading.Thread(target=follow, name=f"codex-{pending.id}", daemon=True).start()
        # Once the cell has returned, its request must survive the kernel's end.
        handle.wait_until_committed()

    def map_listener(self, *, preview: display.MapPreview = lambda: ("", "")) -> MapListener:
        """Return a listener that shows a map's progress below the cell; see `MapOutput`."""
        if os.getpid() != self._pid:
            return lambda _: None  # a forked child has no display
        view = text_views.MapView()
        if not hasattr(self.shell, "kernel"):
            view = text_views.TerminalMapView()
        elif can_show_widgets(self.shell, self.settings.display):
            from nbcodex.notebook.display.widget_views import WidgetMapView

            view = WidgetMapView()
        return display.MapOutput(view, get_client().clock, preview, self._take_notice)

    def assign(self, name: str | None, value: object) -> None:
        """Assign a variable of the notebook; the value becomes the cell's `Out`, too."""
        if name:
            for namespace in self._namespaces():
                namespace[name] = value
        if isinstance(value, Reply):
            self.config.last_reply = value
        # Not by returning it from the magic: IPython would display it below our output.
        self.shell.user_ns["Out"][identity.cell_number(self.shell)] = value

    def _namespaces(self) -> list[dict[str, Any]]:
        # IPython's own magics assign in the notebook's namespace. A script that `%run` executes has
        # one of its own, and would not find the variable in its next line.
        script = self.caller_scope.script
        return [self.shell.user_ns] if script is None else [self.shell.user_ns, script]

    def new_origin(self, variable: str | None = None) -> Origin:
        """Return the origin of a request that the running cell makes."""
        # JupyterLab and Notebook send the cell's id with the code; most other front ends do not.
        parent = getattr(self.shell, "parent_header", None)
        cell = parent.get("metadata", {}).get("cellId") if isinstance(parent, dict) else None
        return Origin(notebook=self.notebook, cell=str(cell) if cell else None, variable=variable)

    def _follow_ask(self, handle: Handle) -> Ending:
        """Wait until a request of `nbcodex.ask` has ended; show it only if it has to wait."""
        if os.getpid() != self._pid:
            return handle.follow()  # a forked child has no display
        options = OutputOptions(only_if_waiting=True)
        return self._show_until_end(handle, self._create_output(handle, options))

    def _show_until_end(
        self, handle: Handle, output: CellOutput, on_end: Callable[[Reply], None] = lambda _: None
    ) -> Ending:
        """Show a request until it ends; its answer stays in the output, even after Stop."""
        stopped: Stopped | None = None
        try:
            ending = handle.follow(output.on_events, max_idle=output.max_idle)
        except Stopped as error:
            stopped, reply = error, error.reply
        else:
            # A request that could not be resumed changes neither its entry nor its variable.
            is_unchanged = isinstance(ending, Failed) and ending.entry_unchanged
            reply = None if is_unchanged else ending.reply

        # Cached, because `finish` runs again after Stop: a notice can be taken only once.
        take_notice = cache(self._take_notice)

        def finish(_stop_pressed: bool) -> None:
            output.close(take_notice)
            if reply is not None:
                on_end(reply)

        # Stop during these steps must not leave a cell without the answer that was paid for.
        _, was_interrupted = run_uninterrupted(finish)
        if stopped is not None or was_interrupted:
            raise stopped or Stopped("Stopped when the request had just ended.", reply=reply)
        return ending

    def _take_notice(self) -> str:
        """Return the journal's problem, or else, only once, a notice of where prompts are kept."""
        return self.journal.problem or get_client().take_notices(self.settings)

    def _create_output(self, handle: Handle, options: OutputOptions) -> CellOutput:
        def act(action: ActionName) -> None:
            # Called from a button's thread, while the cell's thread waits in `follow`.
            handle.retry_now() if action == "retry" else handle.end(action)

        clock, settings = get_client().clock, self.settings
        heading = shorten(options.heading, MAX_HEADING_CHARS)
        view: text_views.RequestView = text_views.TextView(clock)
        if not hasattr(self.shell, "kernel"):
            view = text_views.TerminalView(clock, heading)
        elif can_show_widgets(self.shell, settings.display):
            from nbcodex.notebook.display.widget_views import WidgetView

            view = WidgetView(act, clock)
        options = replace(options, heading=heading, remote_images=settings.remote_images)
        now = clock.now()
        state = PanelState(id=handle.request.id, started_at=now, phase_started_at=now)
        return CellOutput(view, options, state)
