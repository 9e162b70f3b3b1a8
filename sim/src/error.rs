//! The errors CUDA gives, by number, name and text.

use std::fmt;
use torch_uvm::driver::{DriverError, ErrorKind};

/// A `CUresult` other than success. `cudaError_t` uses the same numbers for all of these.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Code(pub i32);

macro_rules! codes {
    ($($name:ident = $number:literal, $text:literal, $kind:ident;)*) => {
        impl Code {
            $(#[doc = concat!("`CUDA_ERROR_", stringify!($name), "`: ", $text)]
            pub const $name: Code = Code($number);)*

            /// Every code the simulator knows.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// The code's name as the CUDA headers give it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Code::$name => concat!("CUDA_ERROR_", stringify!($name)),)* _ => "unrecognized error code" }
            }

            /// What `cuGetErrorString` says.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Code::$name => $text,)* _ => "unrecognized error code" }
            }

            /// How the allocator treats it.
            #[must_use]
            pub fn kind(self) -> ErrorKind {
                match self { $(Code::$name => ErrorKind::$kind,)* _ => ErrorKind::Other }
            }

            /// The code of a name such as `CUDA_ERROR_OUT_OF_MEMORY` (the prefix may be left out), or of a number.
            #[must_use]
            pub fn parse(name: &str) -> Option<Code> {
                let bare = name.strip_prefix("CUDA_ERROR_").unwrap_or(name);
                match bare { $(stringify!($name) => Some(Code::$name),)*
                    number => number.parse().ok().map(Code).filter(|code| Code::ALL.contains(code)) }
            }
        }
    };
}

codes! {
    INVALID_VALUE = 1, "invalid argument", InvalidValue;
    OUT_OF_MEMORY = 2, "out of memory", OutOfMemory;
    NOT_INITIALIZED = 3, "initialization error", Other;
    DEINITIALIZED = 4, "driver shutting down", Other;
    NO_DEVICE = 100, "no CUDA-capable device is detected", Other;
    INVALID_DEVICE = 101, "invalid device ordinal", InvalidValue;
    INVALID_CONTEXT = 201, "invalid device context", Other;
    PEER_ACCESS_UNSUPPORTED = 217, "peer access is not supported between these two devices", NotSupported;
    INVALID_HANDLE = 400, "invalid resource handle", InvalidValue;
    ILLEGAL_STATE = 401, "the operation cannot be performed in the present state", Other;
    NOT_FOUND = 500, "named symbol not found", Other;
    NOT_READY = 600, "device not ready", Other;
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered", Other;
    LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated", Other;
    PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled", Other;
    PEER_ACCESS_NOT_ENABLED = 705, "peer access has not been enabled", Other;
    HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped", Other;
    HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region", Other;
    LAUNCH_FAILED = 719, "unspecified launch failure", Other;
    NOT_PERMITTED = 800, "operation not permitted", Other;
    NOT_SUPPORTED = 801, "operation not supported", NotSupported;
    STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing", StreamCapture;
    STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture", StreamCapture;
    STREAM_CAPTURE_MERGE = 902, "operation would result in a merge of separate capture sequences", StreamCapture;
    STREAM_CAPTURE_UNMATCHED = 903, "capture was not ended in the same stream as it began", StreamCapture;
    STREAM_CAPTURE_UNJOINED = 904, "capturing stream has unjoined work", StreamCapture;
    STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream", StreamCapture;
    STREAM_CAPTURE_IMPLICIT = 906, "operation would make the legacy stream depend on a capturing blocking stream", StreamCapture;
    CAPTURED_EVENT = 907, "operation not permitted on an event last recorded in a capturing stream", StreamCapture;
    STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread", StreamCapture;
    UNKNOWN = 999, "unknown error", Other;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// A failed call of the simulated machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SimError {
    /// What CUDA returns.
    pub code: Code,
    /// The driver entry point, such as `cuMemAlloc_v2`.
    pub call: &'static str,
    /// What was wrong, for a person; CUDA's own text where there is nothing to add.
    pub detail: String,
}

impl fmt::Display for SimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {}: {}", self.call, self.code, self.detail)
    }
}

impl std::error::Error for SimError {}

impl From<SimError> for DriverError {
    fn from(error: SimError) -> Self {
        DriverError {
            kind: error.code.kind(),
            call: error.call,
            code: error.code.0,
            name: error.code.name().to_owned(),
            message: error.detail,
        }
    }
}

/// The result of a call of the simulated machine.
pub type SimResult<T> = Result<T, SimError>;

/// A failure inside the engine, before the entry point's name is put to it.
#[derive(Clone, Debug)]
pub(crate) struct Fail {
    pub code: Code,
    pub detail: String,
}

impl From<Code> for Fail {
    fn from(code: Code) -> Self {
        Fail { code, detail: code.text().to_owned() }
    }
}

/// A failure with a text of its own.
pub(crate) fn fail(code: Code, detail: impl Into<String>) -> Fail {
    Fail { code, detail: detail.into() }
}

/// The result of an engine step.
pub(crate) type Step<T> = Result<T, Fail>;
