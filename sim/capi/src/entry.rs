//! How an entry point is written, and what every one of them does: no panic crosses into C, the runtime's remember
//! their error for `cudaGetLastError`.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::errors::{Code, code};
use crate::listeners;
use crate::log;
use crate::outcome::{Failure, Outcome};
use crate::report;

thread_local! {
    static LAST_ERROR: Cell<Code> = const { Cell::new(code::SUCCESS) };
}

fn run(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => {
            report::after(name);
            code::SUCCESS
        }
        Ok(Err(Failure { code, detail, told })) => {
            // "Not ready" is an answer, not a failure.
            if code != code::NOT_READY {
                let text = format!("{name} returns {code}: {}", detail.as_deref().unwrap_or("refused"));
                if !told {
                    log::line(&text);
                }
                listeners::tell(&text);
            }
            code
        }
        Err(_) => {
            log::line(&format!("{name} panicked: a defect of the simulator"));
            code::UNKNOWN
        }
    }
}

/// Runs a runtime entry point.
pub fn runtime(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    let code = run(name, body);
    if code != code::SUCCESS {
        LAST_ERROR.set(code);
    }
    code
}

/// Runs a driver entry point.
pub fn driver(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    run(name, body)
}

/// `cudaGetLastError` (takes it) and `cudaPeekAtLastError` (leaves it).
pub fn last_error(take: bool) -> Code {
    if take { LAST_ERROR.replace(code::SUCCESS) } else { LAST_ERROR.get() }
}

/// Defines exported entry points. The first word says which API's rules hold: `driver`, `runtime`, or `both`, where one body
/// serves functions of both APIs (`fn cuX = cudaX: (…) { … }`; each side may have several names). The bodies are closures that give
/// an [`Outcome`].
///
/// Every body is `unsafe` in the same way: what C hands over is as the CUDA manual's entry of that name says.
macro_rules! entry_points {
    (both; $(
        $(#[$doc:meta])*
        fn $($driver:ident),+ = $($runtime:ident),+: $params:tt $body:block
    )*) => {$(
        $($crate::entry::entry_points! { @one driver $driver $params $body })+
        $($crate::entry::entry_points! { @one runtime $runtime $params $body })+
    )*};
    (@one $api:ident $name:ident $params:tt $body:block) => {
        $crate::entry::entry_points! { $api; #[doc = concat!("`", stringify!($name), "`.")] fn $name $params $body }
    };
    ($api:ident; $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The arguments are as the CUDA manual asks.
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)] // not every body does something unsafe
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $crate::errors::Code {
            // SAFETY: the caller keeps the manual's contract; `put` and the engine check what can be checked.
            $crate::entry::$api(stringify!($name), || unsafe { $body })
        }
    )*};
}
pub(crate) use entry_points;
