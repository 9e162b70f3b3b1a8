//! Copying folders so that what did not change keeps its time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// All files under `folder`, relative to it.
pub fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut left = vec![PathBuf::new()];
    while let Some(inner) = left.pop() {
        let place = folder.join(&inner);
        let entries = fs::read_dir(&place).with_context(|| format!("cannot read the folder {}", place.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read the folder {}", place.display()))?;
            let path = inner.join(entry.file_name());
            if entry.path().is_dir() {
                left.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    Ok(found)
}

/// Copies a file, or a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return copy_file(from, to);
    }
    files(from)?.iter().try_for_each(|file| copy_file(&from.join(file), &to.join(file)))
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Makes `to` hold what `from` holds, touching only what differs. Gives back how many files changed.
pub fn sync(from: &Path, to: &Path) -> Result<usize> {
    let wanted = files(from)?;
    let mut changed = 0;
    for file in &wanted {
        let (source, target) = (from.join(file), to.join(file));
        let bytes = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
        if fs::read(&target).is_ok_and(|old| old == bytes) {
            continue;
        }
        copy_file(&source, &target)?;
        changed += 1;
    }
    if to.exists() {
        for stale in files(to)?.difference(&wanted) {
            let stale = to.join(stale);
            fs::remove_file(&stale).with_context(|| format!("cannot remove {}", stale.display()))?;
            changed += 1;
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_touches_only_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("deep")).unwrap();
        fs::write(from.join("same"), "1").unwrap();
        fs::write(from.join("deep/other"), "2").unwrap();
        assert_eq!(sync(&from, &to).unwrap(), 2);
        assert_eq!(sync(&from, &to).unwrap(), 0);
        let before = fs::metadata(to.join("same")).unwrap().modified().unwrap();
        fs::write(from.join("deep/other"), "3").unwrap();
        fs::write(to.join("stale"), "4").unwrap();
        assert_eq!(sync(&from, &to).unwrap(), 2);
        assert_eq!(fs::metadata(to.join("same")).unwrap().modified().unwrap(), before);
        assert_eq!(files(&to).unwrap(), files(&from).unwrap());
    }

    #[test]
    fn copy_takes_files_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        fs::create_dir_all(from.join("deep")).unwrap();
        fs::write(from.join("deep/file"), "1").unwrap();
        copy(&from, &folder.path().join("to")).unwrap();
        copy(&from.join("deep/file"), &folder.path().join("a/b")).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("to/deep/file")).unwrap(), "1");
        assert_eq!(fs::read_to_string(folder.path().join("a/b")).unwrap(), "1");
        assert!(copy(&folder.path().join("none"), &folder.path().join("c")).is_err());
    }
}
