//! uv, which installs Python packages: it fetches and unpacks several at a time, and what two environments share lies on
//! the disk once. It asks the index that pip would ask.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::index;
use crate::paths;
use crate::process;
use crate::python::{Python, Venv};

/// uv in the environment of the build tools.
pub struct Uv {
    program: PathBuf,
    settings: Vec<(&'static str, PathBuf)>,
}

impl Uv {
    /// The uv of `tools` ([`crate::build_tools`]).
    pub fn of(tools: &Venv) -> Result<Self> {
        // Beside the environments, which link to its files.
        let mut settings = vec![("UV_CACHE_DIR", paths::target().join("uv"))];
        let given = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        if !given("UV_DEFAULT_INDEX") && !given("UV_INDEX_URL") {
            settings.push(("UV_DEFAULT_INDEX", index::url(tools).into()));
        }
        if let Some(file) = index::certificates() {
            settings.push(("SSL_CERT_FILE", file));
        }
        Ok(Self { program: tools.program("uv"), settings })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).envs(self.settings.iter().map(|(name, value)| (name, value)));
        for variable in ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"] {
            command.env_remove(variable);
        }
        command
    }

    /// Makes a virtual environment, without pip.
    pub fn make_venv(&self, folder: &std::path::Path, python: &Python) -> Result<()> {
        let mut command = self.command(&["venv", "--quiet", "--clear", "--python"]);
        process::capture(command.arg(&python.program).arg(folder))
            .with_context(|| format!("cannot make the virtual environment {}", folder.display()))?;
        Ok(())
    }

    /// `uv pip install` into `venv`: wheels only. Its output is for the user.
    pub fn install(&self, venv: &Venv) -> Command {
        let mut command = self.command(&["pip", "install", "--only-binary=:all:", "--python"]);
        command.arg(venv.python());
        command
    }
}
