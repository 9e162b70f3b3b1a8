//! PyTorch's source: from Debian's source package, or from a folder that the user has.
//!
//! Debian's mirror is the one that the machine's own apt is set to; where there is none the user names one. The
//! tarball is pinned by its SHA-256, so which mirror served it does not matter.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::fingerprint::{Fingerprint, Stamp, sha256_of};
use crate::paths::{self, shown};
use crate::pins::{PinnedSource, TorchRelease};
use crate::process;
use crate::step::{Step, Steps};
use crate::tools;

/// Names a Debian mirror on machines whose apt has none (`SCHEME://HOST/debian`).
const MIRROR_VARIABLE: &str = "TORCH_UVM_DEBIAN_MIRROR";
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The folder that holds the release's unpatched source.
pub fn fetch(steps: &Steps, release: &TorchRelease, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = given {
        check_version(folder, release).with_context(|| format!("--pytorch-src {}", folder.display()))?;
        return fs::canonicalize(folder).with_context(|| format!("cannot read {}", folder.display()));
    }
    let tarball = steps.run(format!("fetch the source of PyTorch {}", release.version()), |step| {
        fetch_tarball(step, &release.source)
    })?;
    let folder = paths::pristine_sources().join(release.source.folder);
    steps.run(format!("unpack {}", release.source.tarball), |step| {
        let inputs = Fingerprint::new("unpack source").value("sha256", release.source.sha256);
        let stamp = Stamp::new(folder.with_added_extension("stamp"), inputs);
        if stamp.is_fresh(&[&folder]) {
            step.up_to_date();
            return Ok(());
        }
        stamp.clear()?;
        unpack(&tarball, &folder)?;
        check_version(&folder, release)?;
        stamp.write()
    })?;
    Ok(folder)
}

fn unpack(tarball: &Path, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove the old {}", shown(folder)))?;
    }
    let parent = paths::pristine_sources();
    fs::create_dir_all(&parent).with_context(|| format!("cannot make the folder {}", shown(&parent)))?;
    process::capture(
        Command::new("tar").args(["-x", "--xz", "--no-same-owner", "-f"]).arg(tarball).arg("-C").arg(parent),
    )?;
    ensure!(folder.is_dir(), "{} holds no folder {}", tarball.display(), shown(folder));
    Ok(())
}

/// An error unless `folder` holds the source of `release`.
fn check_version(folder: &Path, release: &TorchRelease) -> Result<()> {
    let file = folder.join("version.txt");
    let found = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}: is this PyTorch's source?", file.display()))?;
    let found = found.trim();
    // A git checkout of the tag says 2.6.0, one of the release branch 2.6.0a0.
    ensure!(
        found == release.version() || found.strip_prefix(release.version()).is_some_and(|rest| rest.starts_with('a')),
        "{} says {found}, but --torch asks for {}",
        file.display(),
        release.version()
    );
    Ok(())
}

fn fetch_tarball(step: &Step, source: &PinnedSource) -> Result<PathBuf> {
    let folder = paths::downloads();
    let tarball = folder.join(source.tarball);
    if tarball.exists() {
        if sha256_of(&tarball)? == source.sha256 {
            step.up_to_date();
            return Ok(tarball);
        }
        step.note(format_args!("{} is not what it should be: fetched again", shown(&tarball)));
        fs::remove_file(&tarball).with_context(|| format!("cannot remove {}", shown(&tarball)))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", shown(&folder)))?;
    apt_source(step, source, &folder).with_context(|| {
        format!(
            "Debian's source package {} {} could not be fetched; with PyTorch's source at hand, pass --pytorch-src DIR",
            source.package, source.version
        )
    })?;
    let sum = sha256_of(&tarball)?;
    ensure!(
        sum == source.sha256,
        "{} has SHA-256 {sum}, not {}: the mirror served another file; remove it and try another mirror \
         ({MIRROR_VARIABLE})",
        shown(&tarball),
        source.sha256
    );
    Ok(tarball)
}

/// Lets apt fetch the tarball with lists and settings of its own under `target/`: the machine's are not touched, and
/// root is not needed.
fn apt_source(step: &Step, source: &PinnedSource, folder: &Path) -> Result<()> {
    ensure!(
        tools::find("apt-get").is_some(),
        "there is no apt-get on this machine, and that is how Debian's source packages are fetched"
    );
    let mirror = debian_mirror()?;
    step.note(format_args!("Debian mirror: {mirror}"));
    ensure!(
        Path::new(DEBIAN_KEYRING).exists(),
        "{DEBIAN_KEYRING} is missing; on Debian and Ubuntu: apt-get install debian-archive-keyring"
    );
    let apt = paths::target().join("apt");
    for part in ["lists/partial", "cache/archives/partial"] {
        let part = apt.join(part);
        fs::create_dir_all(&part).with_context(|| format!("cannot make the folder {}", shown(&part)))?;
    }
    let list = apt.join("sources.list");
    let line = format!("deb-src [signed-by={DEBIAN_KEYRING}] {mirror} {} main\n", source.suite);
    fs::write(&list, line).with_context(|| format!("cannot write {}", shown(&list)))?;

    let option = |name: &str, value: &Path| format!("{name}={}", value.display());
    let command = || {
        let mut command = Command::new("apt-get");
        for setting in [
            option("Dir::Etc::SourceList", &list),
            option("Dir::Etc::SourceParts", Path::new("/dev/null")),
            option("Dir::State::Lists", &apt.join("lists")),
            option("Dir::Cache", &apt.join("cache")),
            // As root apt drops to a user who may not write here.
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
            // Neither waits for the machine's own apt nor holds it up.
            "Debug::NoLocking=true".into(),
            // A machine that installs updates by itself may have hooks on update, which need root.
            "APT::Update::Post-Invoke=".into(),
            "APT::Update::Post-Invoke-Success=".into(),
        ] {
            command.args(["-o", &setting]);
        }
        command.current_dir(folder);
        command
    };
    process::run(command().arg("update"))?;
    let package = format!("{}={}", source.package, source.version);
    process::run(command().args(["source", "--download-only", "--tar-only", &package]))
}

/// The Debian mirror: what the user names, else the one in the machine's apt settings.
fn debian_mirror() -> Result<String> {
    if let Some(mirror) = env::var(MIRROR_VARIABLE).ok().filter(|mirror| !mirror.is_empty()) {
        return Ok(mirror);
    }
    // Without --no-release-info only what `apt-get update` has fetched is listed, and in a container that may be
    // nothing; with it, nobody says which archive a mirror carries.
    let format = "$(SITE)\t$(COMPONENT)\t$(ORIGIN)\t$(LABEL)";
    let mut listed = String::new();
    for more in [&[][..], &["--no-release-info"]] {
        listed += &process::capture(Command::new("apt-get").args(["indextargets", "--format", format]).args(more))?;
    }
    match pick_mirror(&listed) {
        Some(mirror) => Ok(mirror.to_owned()),
        None => bail!(
            "this machine's apt knows no Debian mirror (is it Ubuntu?): name one in {MIRROR_VARIABLE}, as \
             SCHEME://HOST/debian"
        ),
    }
}

/// The first site that carries Debian's own archive (not its security updates), out of lines of site, component,
/// origin and label.
fn pick_mirror(listed: &str) -> Option<&str> {
    let sites = || {
        listed.lines().filter_map(|line| {
            let mut fields = line.split('\t').map(str::trim);
            let site = fields.next().filter(|site| !site.is_empty())?;
            (fields.next()? == "main").then(|| (site, fields.next().unwrap_or(""), fields.next().unwrap_or("")))
        })
    };
    let said = sites().find(|&(_, origin, label)| origin == "Debian" && label == "Debian");
    let looks_so = || sites().find(|(site, ..)| site.trim_end_matches('/').ends_with("/debian"));
    said.or_else(looks_so).map(|(site, ..)| site)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pins;

    #[test]
    fn mirror_is_the_one_with_debians_archive() {
        let listed = "http://security.example/debian-security\tmain\tDebian\tDebian-Security\n\
                      http://other.example/apt\tmain\tOther\tOther\n\
                      http://mirror.example/pub\tcontrib\tDebian\tDebian\n\
                      http://mirror.example/pub\tmain\tDebian\tDebian\n";
        assert_eq!(pick_mirror(listed), Some("http://mirror.example/pub"));
    }

    #[test]
    fn without_lists_the_folder_decides() {
        let listed = "http://mirror.example/debian-security\tmain\t\t\nhttp://mirror.example/debian/\tmain\t\t\n";
        assert_eq!(pick_mirror(listed), Some("http://mirror.example/debian/"));
        assert_eq!(pick_mirror("http://archive.example/ubuntu\tmain\tUbuntu\tUbuntu\n"), None);
        assert_eq!(pick_mirror(""), None);
    }

    #[test]
    fn source_of_another_release_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let release = pins::release("2.6.0").unwrap();
        assert!(format!("{:#}", check_version(folder.path(), release).unwrap_err()).contains("version.txt"));
        for (version, good) in [("2.6.0\n", true), ("2.6.0a0\n", true), ("2.7.0\n", false), ("2.6.01\n", false)] {
            fs::write(folder.path().join("version.txt"), version).unwrap();
            assert_eq!(check_version(folder.path(), release).is_ok(), good, "{version}");
        }
    }
}
