//! Keeps two commands from making the same things at the same time.

use std::fs::{self, File, TryLockError};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};

use crate::output;
use crate::paths::{self, shown};

/// Held while something under `target/` is made; let go when dropped, and by the system if the command dies. Steps of one
/// command that run beside each other share it.
pub struct Lock {
    _file: Arc<File>,
}

/// This process's lock while any of its threads holds it.
static HELD: Mutex<Weak<File>> = Mutex::new(Weak::new());

impl Lock {
    pub fn take() -> Result<Self> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = held.upgrade() {
            return Ok(Self { _file: file });
        }
        let folder = paths::target();
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", shown(&folder)))?;
        let path = folder.join("xtask.lock");
        let file = File::create(&path).with_context(|| format!("cannot write {}", shown(&path)))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            output::say("==> waiting for another `cargo xtask` to finish its preparations");
        }
        file.lock().with_context(|| format!("cannot lock {}", shown(&path)))?;
        let file = Arc::new(file);
        *held = Arc::downgrade(&file);
        Ok(Self { _file: file })
    }
}
