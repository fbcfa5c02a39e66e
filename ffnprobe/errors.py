"""What can go wrong that is not a bug: each error is one line that says what, got what, and what to do."""


class FFNProbeError(Exception):
    """A condition the user can act on. `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(FFNProbeError):
    """The user's input: a name, a file, a layer, an option."""

    exit_code = 2


class ModelRefused(FFNProbeError):
    """The model has no feed-forward layers that ffnprobe can measure truthfully."""

    exit_code = 3


class MachineError(FFNProbeError):
    """The machine: disk, memory, network, permissions."""

    exit_code = 4
