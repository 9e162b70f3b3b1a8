//! Where the options come from: the environment first, then settings made at run time, before or after the allocator is
//! made.

use super::failure::guarded;
use super::{ALLOCATOR, SETTINGS, convert, ffi};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::settings_string::{self, Parsed, two_backends};

/// PyTorch's variable for all accelerators. Those versions that do not know it yet (up to 2.8) leave it to us alone.
const ANY_ACCELERATOR: &str = "PYTORCH_ALLOC_CONF";
/// PyTorch's variables, in the order in which they are read: the later one's keys win.
const VARIABLES: [&str; 2] = [ANY_ACCELERATOR, "PYTORCH_CUDA_ALLOC_CONF"];

/// The options until there is an allocator to keep them.
pub(super) struct Settings {
    options: Option<Options>,
}

impl Settings {
    pub const fn new() -> Self {
        Self { options: None }
    }

    /// The options so far; at first those of the environment.
    pub fn options(&mut self) -> Result<&mut Options> {
        if self.options.is_none() {
            self.options = Some(from_environment()?);
        }
        self.options.as_mut().ok_or_else(|| Error::Internal("no options".to_owned()))
    }
}

fn from_environment() -> Result<Options> {
    let mut options = Options::default();
    let mut backend = None;
    for variable in VARIABLES {
        let parsed = apply_variable(&options, variable)?;
        options = parsed.options;
        backend = backend.or(parsed.backend.map(|backend| (variable, backend)));
    }
    match backend {
        // One in the same variable is refused there; PyTorch reads the other one too.
        Some((variable, backend)) if options.enabled => Err(named(variable, two_backends(&backend))),
        _ => Ok(options),
    }
}

fn apply_variable(options: &Options, variable: &str) -> Result<Parsed> {
    let tokens = variable_tokens(variable).unwrap_or_default();
    settings_string::apply(options, &tokens).map_err(|error| named(variable, error))
}

/// The tokens of a variable; `None` where it is not set.
fn variable_tokens(variable: &str) -> Option<Vec<String>> {
    std::env::var_os(variable).map(|conf| ffi::settings_tokens(conf.as_encoded_bytes()))
}

/// An error with the variable that it is about.
fn named(variable: &str, error: Error) -> Error {
    match error {
        Error::InvalidArgument(message) => Error::InvalidArgument(format!("{variable}: {message}")),
        other => other,
    }
}

/// What the environment asks for. Called while libraries load: whatever is wrong with the settings is told when they are
/// parsed.
pub(super) fn environment() -> ffi::Environment {
    let read = || {
        let set: Vec<_> = VARIABLES.into_iter().filter_map(variable_tokens).collect();
        Ok(ffi::Environment {
            has_ours: set.iter().any(|tokens| settings_string::has_ours(tokens)),
            wanted: set.iter().rev().find_map(|tokens| settings_string::wanted(tokens)).unwrap_or(false),
            valid: from_environment().is_ok(),
        })
    };
    guarded(read).unwrap_or(ffi::Environment { has_ours: false, wanted: false, valid: false })
}

/// Whether a settings string has a key of ours.
pub(super) fn has_ours(conf: &[u8]) -> bool {
    guarded(|| Ok(settings_string::has_ours(&ffi::settings_tokens(conf)))).unwrap_or(false)
}

/// A settings string less our part.
pub(super) fn without_ours(conf: &[u8]) -> String {
    guarded(|| Ok(settings_string::without_ours(&ffi::settings_tokens(conf)))).unwrap_or_default()
}

/// The options in force, as a settings string.
pub(super) fn options(out: &mut String) -> bool {
    let read = || match ALLOCATOR.get() {
        Some(allocator) => Ok(allocator.options().to_string()),
        None => Ok(SETTINGS.lock().options()?.to_string()),
    };
    guarded(read).map(|text| *out = text).is_some()
}

/// Checks our part of a whole settings string, and of the variable that PyTorch itself may not read. `active`: this
/// allocator is PyTorch's backend.
pub(super) fn check_settings(conf: &[u8], active: bool) -> bool {
    guarded(|| {
        let base = Options { enabled: active, ..Options::default() };
        apply_variable(&base, ANY_ACCELERATOR)?;
        let wanted = settings_string::apply(&base, &ffi::settings_tokens(conf))?.options.enabled;
        match (wanted, active) {
            (true, false) => Err(Error::InvalidArgument(
                "use_uvm: 'True' comes too late: the backend is chosen when PyTorch is loaded, from \
                 PYTORCH_CUDA_ALLOC_CONF. Set it before `import torch`"
                    .to_owned(),
            )),
            (false, true) => Err(Error::InvalidArgument(
                "use_uvm: 'False' is not allowed at run time: the backend is chosen when PyTorch is loaded".to_owned(),
            )),
            _ => Ok(()),
        }
    })
    .is_some()
}

/// Settings made at run time (`torch.cuda.memory._set_allocator_settings`). PyTorch has parsed its
/// own keys, and had ours checked.
pub(super) fn apply_settings(conf: &[u8], native: &ffi::NativeSettings) -> bool {
    guarded(|| {
        let mut settings = SETTINGS.lock();
        let tokens = ffi::settings_tokens(conf);
        let Some(allocator) = ALLOCATOR.get() else {
            let options = settings.options()?;
            *options = settings_string::apply(options, &tokens)?.options;
            return Ok(());
        };
        let parsed = settings_string::apply(&allocator.options(), &tokens)?;
        if parsed.has_ours {
            allocator.set_options(parsed.options)?;
        }
        allocator.set_native_options(convert::native_options(native));
        Ok(())
    })
    .is_some()
}
