//! Keeps two commands from making the same things at the same time.

use std::fs::{self, File, TryLockError};

use anyhow::{Context, Result};

use crate::paths::{self, shown};

/// Held while something under `target/` is made; let go when dropped, and by the system if the command dies.
pub struct Lock {
    _file: File,
}

impl Lock {
    pub fn take() -> Result<Self> {
        let folder = paths::target();
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", shown(&folder)))?;
        let path = folder.join("xtask.lock");
        let file = File::create(&path).with_context(|| format!("cannot write {}", shown(&path)))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            eprintln!("==> waiting for another `cargo xtask` to finish its preparations");
        }
        file.lock().with_context(|| format!("cannot lock {}", shown(&path)))?;
        Ok(Self { _file: file })
    }
}
