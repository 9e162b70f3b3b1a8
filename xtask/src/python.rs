//! The Python interpreter that wheels are made for, and virtual environments.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths::shown;
use crate::pins::{OfficialTorch, PinnedPackage};
use crate::process;
use crate::tools;
use crate::uv::Uv;

/// Names the interpreter to use instead of `python3`.
const PYTHON_VARIABLE: &str = "TORCH_UVM_PYTHON";

/// A Python interpreter of the machine.
#[derive(Clone)]
pub struct Python {
    pub program: PathBuf,
    /// Major and minor version.
    pub version: (u32, u32),
    /// The wheel tag of its ABI, `cp311` say.
    pub tag: String,
    /// The machine as `uname -m` calls it.
    pub machine: String,
}

/// Prints: major, minor, tag, machine, whether virtual environments can be made.
const QUESTION: &str = "\
import importlib.util, platform, sys, sysconfig
free = 't' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''
name = {'cpython': 'cp'}.get(sys.implementation.name, sys.implementation.name)
venv = all(importlib.util.find_spec(module) for module in ('venv', 'ensurepip'))
print(sys.version_info[0], sys.version_info[1], f'{name}{sys.version_info[0]}{sys.version_info[1]}{free}',
      platform.machine(), venv)
";

impl Python {
    /// The interpreter that `TORCH_UVM_PYTHON` names, else `python3`; an error unless `torch` has wheels for it.
    pub fn find(torch: Option<&OfficialTorch>) -> Result<Self> {
        let name = env::var(PYTHON_VARIABLE).ok().filter(|name| !name.is_empty());
        let name = name.as_deref().unwrap_or("python3");
        let Some(program) = tools::find(name) else {
            bail!(
                "no Python interpreter «{name}» on this machine; on Debian and Ubuntu: apt-get install python3 \
                 python3-venv; or name one in {PYTHON_VARIABLE}"
            );
        };
        let answer = process::capture(Command::new(&program).args(["-I", "-c", QUESTION]))
            .with_context(|| format!("cannot ask {} which Python it is", program.display()))?;
        let (python, has_venv) = parse_answer(&answer, program)?;
        torch.map_or(Ok(()), |torch| python.check(torch))?;
        if !has_venv {
            bail!(
                "{} cannot make virtual environments: its modules venv and ensurepip are missing; on Debian and \
                 Ubuntu: apt-get install python3-venv",
                python.program.display()
            );
        }
        Ok(python)
    }

    /// An error unless `torch` has wheels for this Python.
    pub fn check(&self, torch: &OfficialTorch) -> Result<()> {
        let (first, last) = torch.python;
        if self.version < first || self.version > last {
            bail!(
                "{} is Python {}.{}; PyTorch {} has wheels for Python {}.{} to {}.{}: install one of these and name \
                 it in {PYTHON_VARIABLE}",
                self.program.display(),
                self.version.0,
                self.version.1,
                torch.version(),
                first.0,
                first.1,
                last.0,
                last.1
            );
        }
        Ok(())
    }
}

fn parse_answer(answer: &str, program: PathBuf) -> Result<(Python, bool)> {
    let words: Vec<_> = answer.split_whitespace().collect();
    let &[major, minor, tag, machine, venv] = words.as_slice() else {
        bail!("{} gave an answer that was not understood: {answer:?}", program.display());
    };
    let number = |text: &str| text.parse().with_context(|| format!("{} is no Python version", text));
    let version = (number(major)?, number(minor)?);
    Ok((Python { program, version, tag: tag.into(), machine: machine.into() }, venv == "True"))
}

/// A virtual environment.
pub struct Venv {
    folder: PathBuf,
}

impl Venv {
    /// The environment in `folder`, made with `python` if it is not there or not that Python's.
    pub fn ensure(folder: PathBuf, python: &Python) -> Result<Self> {
        Self::ensure_with(folder, python, |folder| {
            process::capture(Command::new(&python.program).args(["-m", "venv", "--clear"]).arg(folder))?;
            Ok(())
        })
    }

    /// The same without pip, made by uv: quicker.
    pub fn ensure_bare(folder: PathBuf, python: &Python, uv: &Uv) -> Result<Self> {
        Self::ensure_with(folder, python, |folder| uv.make_venv(folder, python))
    }

    fn ensure_with(folder: PathBuf, python: &Python, make: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let venv = Self { folder };
        let wanted = format!("{}\n{}\n", python.program.display(), python.tag);
        let note = venv.folder.join("made-for.txt");
        if venv.python().exists() && fs::read_to_string(&note).is_ok_and(|made_for| made_for == wanted) {
            return Ok(venv);
        }
        make(&venv.folder).with_context(|| format!("cannot make the virtual environment {}", venv.folder.display()))?;
        fs::write(&note, wanted).with_context(|| format!("cannot write {}", note.display()))?;
        Ok(venv)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn python(&self) -> PathBuf {
        self.program("python")
    }

    /// A program that a package brought into the environment.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }

    /// `pip` with a subcommand; the output is for the user, who sees downloads progress.
    pub fn pip<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Command {
        let mut command = Command::new(self.python());
        command.args(["-m", "pip", "--disable-pip-version-check"]).args(arguments);
        // Packages of the surrounding Python must not be seen: what is here decides.
        command.env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        command
    }
}

/// Writes a pip requirements file with the packages and their checksums.
pub fn write_requirements(file: &Path, packages: &[PinnedPackage]) -> Result<()> {
    let lines: String = packages.iter().map(|package| package.requirement() + "\n").collect();
    fs::write(file, lines).with_context(|| format!("cannot write {}", shown(file)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pins;

    fn python(version: (u32, u32)) -> Python {
        Python { program: "/usr/bin/python3".into(), version, tag: "cp3".into(), machine: "x86_64".into() }
    }

    #[test]
    fn answers_are_understood() {
        let (python, venv) = parse_answer("3 11 cp311 x86_64 True\n", "/usr/bin/python3".into()).unwrap();
        assert_eq!((python.version, python.tag.as_str(), venv), ((3, 11), "cp311", true));
        assert!(parse_answer("hello", "/usr/bin/python3".into()).is_err());
    }

    #[test]
    fn pythons_without_wheels_are_refused_by_name() {
        let release = &pins::release("2.6.0").unwrap().official;
        assert!(python((3, 9)).check(release).is_ok());
        assert!(python((3, 13)).check(release).is_ok());
        let error = python((3, 14)).check(release).unwrap_err().to_string();
        assert!(error.contains("3.14") && error.contains("3.9 to 3.13") && error.contains(PYTHON_VARIABLE), "{error}");
        assert!(python((3, 8)).check(release).is_err());
    }
}
