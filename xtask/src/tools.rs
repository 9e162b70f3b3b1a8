//! The programs that the machine must have, looked for before any work begins.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// A program and the Debian (and Ubuntu) package that brings it.
#[derive(Clone, Copy)]
pub struct Tool {
    pub program: &'static str,
    pub package: &'static str,
}

pub const CXX: Tool = Tool { program: "g++", package: "g++" };
pub const CC: Tool = Tool { program: "cc", package: "gcc" };
pub const PATCH: Tool = Tool { program: "patch", package: "patch" };
pub const TAR: Tool = Tool { program: "tar", package: "tar" };
pub const XZ: Tool = Tool { program: "xz", package: "xz-utils" };

/// What [`crate::wheel`] calls.
pub fn for_wheel() -> Vec<Tool> {
    for_plugin().into_iter().chain([PATCH, TAR, XZ]).collect()
}

/// What [`crate::plugin`] calls. `g++` stands for the compiler: `CXX` may name another.
pub fn for_plugin() -> Vec<Tool> {
    env::var_os("CXX").is_none().then_some(CXX).into_iter().collect()
}

/// An error that names every missing tool and one command that brings them, or nothing.
pub fn require(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| find(tool.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    bail!(
        "not found on this machine: {}; on Debian and Ubuntu: apt-get install {}",
        programs.join(", "),
        packages.join(" ")
    )
}

/// Where `program` lies in `PATH`; a program given by its path is itself.
pub fn find(program: &str) -> Option<PathBuf> {
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0);
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(is_program);
    }
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(program)).find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_tool_is_named_with_its_package() {
        let missing = [
            Tool { program: "sh", package: "dash" },
            Tool { program: "no-such-compiler", package: "compiler-package" },
            Tool { program: "no-such-patcher", package: "patcher-package" },
        ];
        let error = require(&missing).unwrap_err().to_string();
        assert!(error.contains("no-such-compiler, no-such-patcher"), "{error}");
        assert!(error.contains("apt-get install compiler-package patcher-package"), "{error}");
    }

    #[test]
    fn find_takes_names_and_paths() {
        let shell = find("sh").unwrap();
        assert_eq!(find(&shell.to_string_lossy()), Some(shell));
        assert_eq!(find("/no/such/program"), None);
    }
}
