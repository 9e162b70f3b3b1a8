//! Fingerprints of a step's inputs, so that a step whose inputs did not change is skipped.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The SHA-256 of a file's bytes, in lower-case hexadecimal.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = io::Read::read(&mut file, &mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            return Ok(hexadecimal(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Gathers a step's inputs. Every input is named, so that two inputs never add up to the same as two others.
#[derive(Default)]
pub struct Fingerprint {
    hasher: Sha256,
}

impl Fingerprint {
    /// `recipe` names the step and should change when the step's own code changes what it makes.
    pub fn new(recipe: &str) -> Self {
        Self::default().value("recipe", recipe)
    }

    pub fn value(mut self, name: &str, value: &str) -> Self {
        for part in [name, value] {
            self.hasher.update((part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
        self
    }

    /// A file by its bytes.
    pub fn file(self, path: &Path) -> Result<Self> {
        let sum = sha256_of(path)?;
        Ok(self.value(&path.to_string_lossy(), &sum))
    }

    /// A file too big to read each time: by its size, its time of change and its inode.
    pub fn big_file(self, path: &Path) -> Result<Self> {
        let data = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        let identity = format!("{} {}.{} {}", data.len(), data.mtime(), data.mtime_nsec(), data.ino());
        Ok(self.value(&path.to_string_lossy(), &identity))
    }

    pub fn finish(self) -> String {
        hexadecimal(&self.hasher.finalize())
    }
}

/// A note beside a step's result that says which inputs it was made from.
pub struct Stamp {
    path: PathBuf,
    fingerprint: String,
}

impl Stamp {
    pub fn new(path: impl Into<PathBuf>, fingerprint: Fingerprint) -> Self {
        Self { path: path.into(), fingerprint: fingerprint.finish() }
    }

    /// Whether the step ended well with these inputs, and its results are still there.
    pub fn is_fresh(&self, results: &[&Path]) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|old| old == self.fingerprint)
            && results.iter().all(|result| result.exists())
    }

    /// Takes the note away: the results are about to change.
    pub fn clear(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Notes that the results now fit the inputs.
    pub fn write(&self) -> Result<()> {
        let write = || -> io::Result<()> {
            if let Some(folder) = self.path.parent() {
                fs::create_dir_all(folder)?;
            }
            File::create(&self.path)?.write_all(self.fingerprint.as_bytes())
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_of_known_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("abc");
        fs::write(&file, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_of(&file).unwrap(), expected);
    }

    #[test]
    fn inputs_do_not_run_together() {
        let one = Fingerprint::new("r").value("ab", "c").finish();
        let two = Fingerprint::new("r").value("a", "bc").finish();
        assert_ne!(one, two);
    }

    #[test]
    fn stamp_follows_inputs_and_results() {
        let folder = tempfile::tempdir().unwrap();
        let input = folder.path().join("input");
        let result = folder.path().join("result");
        fs::write(&input, "1").unwrap();
        fs::write(&result, "made").unwrap();
        let stamp = || Stamp::new(folder.path().join("stamps/step"), Fingerprint::new("step").file(&input).unwrap());
        assert!(!stamp().is_fresh(&[&result]));
        stamp().write().unwrap();
        assert!(stamp().is_fresh(&[&result]));
        fs::write(&input, "2").unwrap();
        assert!(!stamp().is_fresh(&[&result]));
        stamp().write().unwrap();
        fs::remove_file(&result).unwrap();
        assert!(!stamp().is_fresh(&[&result]));
        stamp().clear().unwrap();
        stamp().clear().unwrap();
    }

    #[test]
    fn big_files_are_told_apart_by_size_and_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("wheel");
        fs::write(&file, "1").unwrap();
        let before = Fingerprint::new("r").big_file(&file).unwrap().finish();
        assert_eq!(before, Fingerprint::new("r").big_file(&file).unwrap().finish());
        fs::write(&file, "22").unwrap();
        assert_ne!(before, Fingerprint::new("r").big_file(&file).unwrap().finish());
    }
}
