//! `cargo xtask release`: a version, its wheel, and the checksums.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use toml_edit::value;

use crate::fingerprint::sha256_of;
use crate::lock::Lock;
use crate::package;
use crate::paths::{self, shown};
use crate::plugin;
use crate::process;
use crate::sim::cargo;
use crate::step::Steps;

const CHANGELOG: &str = "CHANGELOG.md";
const CHECKSUMS: &str = "SHA256SUMS";

/// Sets the version everywhere, and makes the wheel and its checksums in `out`. CHANGELOG.md must say what is new.
pub fn run(version: &str, out: Option<PathBuf>) -> Result<()> {
    let new = parse(version)?;
    let steps = Steps::new("release");
    steps.run(format!("look for {version} in {CHANGELOG}"), |step| {
        let text =
            fs::read_to_string(paths::root().join(CHANGELOG)).with_context(|| format!("cannot read {CHANGELOG}"))?;
        let lines = entry(&text, version)?.lines().filter(|line| !line.trim().is_empty()).count();
        step.note(format_args!("{lines} lines"));
        Ok(())
    })?;
    steps.run("set the version", |step| {
        let old = package::version()?;
        ensure!(new >= parse(&old)?, "{version} is older than {old}, the version that Cargo.toml has");
        if old == version {
            step.up_to_date();
            return Ok(());
        }
        let file = paths::root().join("Cargo.toml");
        let mut manifest = package::document(&file)?;
        manifest["workspace"]["package"]["version"] = value(version);
        fs::write(&file, manifest.to_string()).with_context(|| format!("cannot write {}", shown(&file)))?;
        // Cargo.lock names the workspace's own packages with their version.
        let mut update = std::process::Command::new(cargo());
        process::run(update.args(["update", "--workspace", "--offline", "--quiet"]).current_dir(paths::root()))
    })?;
    let out = out.unwrap_or_else(|| paths::target().join("release").join(version));
    let wheel = {
        let _lock = Lock::take()?;
        plugin::make(&plugin::releases(&[], plugin::machine())?, &out)?
    };
    steps.run(format!("write {CHECKSUMS}"), |_| checksums(&out, &[wheel]))?;
    steps.finish(format_args!("{}; left to do: commit, and tag the commit v{version}", shown(&out)));
    Ok(())
}

/// A version's three numbers.
fn parse(version: &str) -> Result<[u64; 3]> {
    let numbers: Option<Vec<u64>> = version.split('.').map(|part| part.parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[u64; 3]>::try_from(numbers).ok());
    // «01» and «+1» are numbers to Rust, and not what a version has.
    let numbers = numbers.filter(|numbers| numbers.map(|number| number.to_string()).join(".") == version);
    numbers.with_context(|| format!("«{version}» is not a version: expected three numbers, such as 1.2.3"))
}

/// What the changelog says of a version: the text below its heading `## VERSION`, a date behind it or not.
fn entry<'a>(changelog: &'a str, version: &str) -> Result<&'a str> {
    let is_heading =
        |line: &str| line.strip_prefix("## ").and_then(|rest| rest.split([' ', ',']).next()) == Some(version);
    let heading = changelog.lines().find(|line| is_heading(line));
    let heading =
        heading.with_context(|| format!("{CHANGELOG} has no heading «## {version}»: say there what is new"))?;
    let (_, below) = changelog.split_once(&format!("{heading}\n")).unwrap_or_default();
    let text = below.split("\n## ").next().unwrap_or_default().trim();
    ensure!(!text.is_empty(), "{CHANGELOG} says nothing below «{heading}»");
    Ok(text)
}

/// Writes the files' checksums as `sha256sum --check` reads them.
fn checksums(folder: &Path, files: &[PathBuf]) -> Result<()> {
    let mut text = String::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("{}  {name}\n", sha256_of(file)?);
    }
    let file = folder.join(CHECKSUMS);
    fs::write(&file, text).with_context(|| format!("cannot write {}", shown(&file)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn versions_are_three_numbers() {
        assert!(parse("0.10.0").unwrap() > parse("0.9.12").unwrap());
        for wrong in ["1.2", "1.2.3.4", "1.2.x", "01.2.3", "+1.2.3", "v1.2.3", ""] {
            assert!(parse(wrong).unwrap_err().to_string().contains("1.2.3"), "{wrong}");
        }
        parse(&package::version().unwrap()).unwrap();
    }

    #[test]
    fn changelog_must_say_something() {
        let text = "# Changes\n\n## 0.2.0, 2026-12-01\n\nNew.\n\n## 0.1.0\n\n## 0.0.1\n\nOld.\n";
        assert_eq!(entry(text, "0.2.0").unwrap(), "New.");
        assert_eq!(entry(text, "0.0.1").unwrap(), "Old.");
        assert!(entry(text, "0.1.0").unwrap_err().to_string().contains("nothing"));
        assert!(entry(text, "0.2").unwrap_err().to_string().contains("## 0.2»"));
        let ours = fs::read_to_string(paths::root().join(CHANGELOG)).unwrap();
        entry(&ours, &package::version().unwrap()).unwrap();
    }

    #[test]
    fn checksums_are_what_sha256sum_reads() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.whl");
        fs::write(&file, "a").unwrap();
        checksums(folder.path(), &[file]).unwrap();
        let check = || Command::new("sha256sum").args(["--check", CHECKSUMS]).current_dir(&folder).output().unwrap();
        assert!(check().status.success());
        fs::write(folder.path().join("a.whl"), "b").unwrap();
        assert!(!check().status.success());
    }
}
