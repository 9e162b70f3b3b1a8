//! Writes a wheel that is an official one with some members changed, under a local version.
//!
//! The members that stay are copied as they are compressed: an 800 MB wheel takes seconds, not minutes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// A wheel's file name, taken apart (there is no build tag in PyTorch's).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WheelName {
    pub package: String,
    pub version: String,
    pub python: String,
    pub abi: String,
    pub platform: String,
}

impl WheelName {
    pub fn parse(file: &Path) -> Result<Self> {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let parts: Vec<_> = name.strip_suffix(".whl").unwrap_or_default().split('-').collect();
        let [package, version, python, abi, platform] = parts[..] else {
            bail!("{name} is not named as a wheel is: package-version-python-abi-platform.whl");
        };
        let [package, version, python, abi, platform] = [package, version, python, abi, platform].map(str::to_owned);
        Ok(Self { package, version, python, abi, platform })
    }

    pub fn file_name(&self) -> String {
        format!("{}-{}.whl", self.stem(), self.tag())
    }

    pub fn tag(&self) -> String {
        format!("{}-{}-{}", self.python, self.abi, self.platform)
    }

    fn stem(&self) -> String {
        format!("{}-{}", self.package, self.version)
    }

    /// The folder of the wheel's metadata, with a slash at its end.
    pub fn metadata_folder(&self) -> String {
        format!("{}.dist-info/", self.stem())
    }
}

/// Writes into the folder `out` the wheel `official` under the name `name`, with `libraries` (member, file) put in
/// place of the members of the same name. Gives back the new wheel's path.
pub fn repack(official: &Path, name: &WheelName, libraries: &[(&str, &Path)], out: &Path) -> Result<PathBuf> {
    let old = WheelName::parse(official)?;
    let file = File::open(official).with_context(|| format!("cannot read {}", official.display()))?;
    let mut archive = ZipArchive::new(BufReader::new(file))
        .with_context(|| format!("{} is not a zip archive that can be read", official.display()))?;
    let changed = changed_members(&mut archive, &old, name, libraries)
        .with_context(|| format!("cannot change the members of {}", official.display()))?;

    fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
    let result = out.join(name.file_name());
    // A half-written wheel must not look like a whole one.
    let draft = result.with_extension("whl.part");
    write_members(&mut archive, &old, name, &changed, &draft)
        .with_context(|| format!("cannot write {}; is the disk full?", draft.display()))?;
    fs::rename(&draft, &result).with_context(|| format!("cannot write {}", result.display()))?;
    Ok(result)
}

/// The new bytes of every member that does not stay as it is, by its old name.
fn changed_members(
    archive: &mut ZipArchive<BufReader<File>>,
    old: &WheelName,
    new: &WheelName,
    libraries: &[(&str, &Path)],
) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut changed = BTreeMap::new();
    for (member, file) in libraries {
        ensure!(archive.index_for_name(member).is_some(), "there is no member {member}");
        changed.insert(member.to_string(), fs::read(file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    let folder = old.metadata_folder();
    for (member, edit) in [
        (format!("{folder}METADATA"), edit_metadata as fn(&str, &WheelName) -> Result<String>),
        (format!("{folder}WHEEL"), edit_wheel),
        (format!("{}/version.py", old.package), edit_version),
    ] {
        let edited = edit(&text_of(archive, &member)?, new).with_context(|| format!("{member} is not as expected"))?;
        changed.insert(member, edited.into_bytes());
    }
    let record = format!("{folder}RECORD");
    let edited = edit_record(&text_of(archive, &record)?, &folder, &new.metadata_folder(), &changed)
        .with_context(|| format!("{record} is not as expected"))?;
    changed.insert(record, edited.into_bytes());
    Ok(changed)
}

fn text_of(archive: &mut ZipArchive<BufReader<File>>, member: &str) -> Result<String> {
    let mut text = String::new();
    archive
        .by_name(member)
        .map_err(anyhow::Error::from)
        .and_then(|mut file| Ok(file.read_to_string(&mut text)?))
        .with_context(|| format!("cannot read the member {member}"))?;
    Ok(text)
}

fn write_members(
    archive: &mut ZipArchive<BufReader<File>>,
    old: &WheelName,
    new: &WheelName,
    changed: &BTreeMap<String, Vec<u8>>,
    draft: &Path,
) -> Result<()> {
    let mut writer = ZipWriter::new(BufWriter::with_capacity(1 << 20, File::create(draft)?));
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index)?;
        let name = member.name()?.into_owned();
        let renamed = renamed(&name, &old.metadata_folder(), &new.metadata_folder());
        match changed.get(&name) {
            None => writer.raw_copy_file_rename(member, renamed)?,
            Some(bytes) => {
                // The old time of change keeps the wheel reproducible.
                let options = SimpleFileOptions::default()
                    .compression_method(CompressionMethod::Deflated)
                    .unix_permissions(member.unix_mode().unwrap_or(0o644) & 0o777)
                    .last_modified_time(member.last_modified().unwrap_or_default());
                writer.start_file(renamed, options)?;
                writer.write_all(bytes)?;
            }
        }
    }
    writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(())
}

fn renamed(member: &str, old_folder: &str, new_folder: &str) -> String {
    match member.strip_prefix(old_folder) {
        Some(rest) => format!("{new_folder}{rest}"),
        None => member.to_owned(),
    }
}

/// METADATA: the version.
fn edit_metadata(text: &str, new: &WheelName) -> Result<String> {
    // After the head comes a free text, which may say anything.
    let (head, description) = text.split_at(text.find("\n\n").map_or(text.len(), |end| end + 1));
    let head = replace_line(head, "Version: ", &new.version)?;
    Ok(head + description)
}

/// WHEEL: who wrote it, and the tag, which has to agree with the file's name.
fn edit_wheel(text: &str, new: &WheelName) -> Result<String> {
    let text = replace_line(text, "Tag: ", &new.tag())?;
    replace_line(&text, "Generator: ", "torch-uvm-xtask")
}

/// version.py: `torch.__version__` says the same as pip; which CUDA it is stays in `torch.version.cuda`.
fn edit_version(text: &str, new: &WheelName) -> Result<String> {
    replace_line(text, "__version__ = ", &format!("'{}'", new.version))
}

/// Puts `value` behind `key` in the one line that starts with it; an error if there is none or more.
fn replace_line(text: &str, key: &str, value: &str) -> Result<String> {
    let found = text.lines().filter(|line| line.starts_with(key)).count();
    ensure!(found == 1, "{found} lines start with «{key}» where one was expected");
    let replace = |line: &str| if line.starts_with(key) { format!("{key}{value}\n") } else { line.to_owned() };
    Ok(text.split_inclusive('\n').map(replace).collect())
}

/// RECORD: the checksums and sizes of what changed, and the metadata folder's new name.
fn edit_record(text: &str, old_folder: &str, new_folder: &str, changed: &BTreeMap<String, Vec<u8>>) -> Result<String> {
    let mut left: Vec<_> = changed.keys().collect();
    let mut edited = String::with_capacity(text.len() + 1024);
    for line in text.lines() {
        // path,checksum,size: a path with a comma in it would be quoted, and only its start matters here.
        let mut fields = line.rsplitn(3, ',');
        let (size, sum) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let Some(path) = fields.next() else { bail!("«{line}» is not path,checksum,size") };
        let shown = renamed(path, old_folder, new_folder);
        match changed.get(path) {
            None => edited += &format!("{shown},{sum},{size}\n"),
            Some(bytes) => {
                left.retain(|member| *member != path);
                edited += &record_line(&shown, bytes);
            }
        }
    }
    ensure!(left.is_empty(), "it does not list {}", left.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", "));
    Ok(edited)
}

/// A file's line in RECORD.
pub fn record_line(path: &str, bytes: &[u8]) -> String {
    format!("{path},sha256={},{}\n", URL_SAFE_NO_PAD.encode(Sha256::digest(bytes)), bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFICIAL: &str = "torch-2.6.0-cp311-cp311-manylinux1_x86_64.whl";

    fn new_name() -> WheelName {
        let mut name = WheelName::parse(Path::new(OFFICIAL)).unwrap();
        name.version = "2.6.0+uvm.0.1.0".into();
        name.platform = "manylinux_2_34_x86_64".into();
        name
    }

    fn digest(bytes: &[u8]) -> String {
        format!("sha256={},{}", URL_SAFE_NO_PAD.encode(Sha256::digest(bytes)), bytes.len())
    }

    fn official_wheel(folder: &Path) -> PathBuf {
        let path = folder.join(OFFICIAL);
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        let library = "library ".repeat(1000);
        let metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n\nVersion: not this one\n";
        let members = [
            ("torch/lib/libc10.so", library.as_str()),
            ("torch/lib/libc10_cuda.so", "official"),
            ("torch/version.py", "from typing import Optional\n\n__version__ = '2.6.0+cu124'\ncuda = '12.4'\n"),
            ("torch-2.6.0.dist-info/METADATA", metadata),
            ("torch-2.6.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nTag: cp311-cp311-linux_x86_64\n\n"),
        ];
        let mut record = String::new();
        for (name, text) in members {
            writer.start_file(name, SimpleFileOptions::default().unix_permissions(0o755)).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
            record += &format!("{name},{}\n", digest(text.as_bytes()));
        }
        record += "torch-2.6.0.dist-info/RECORD,,\n";
        writer.start_file("torch-2.6.0.dist-info/RECORD", SimpleFileOptions::default()).unwrap();
        writer.write_all(record.as_bytes()).unwrap();
        writer.finish().unwrap();
        path
    }

    #[test]
    fn names_are_taken_apart_and_put_together() {
        let name = WheelName::parse(Path::new("/x").join(OFFICIAL).as_path()).unwrap();
        assert_eq!((name.version.as_str(), name.platform.as_str()), ("2.6.0", "manylinux1_x86_64"));
        assert_eq!(name.file_name(), OFFICIAL);
        assert_eq!(new_name().file_name(), "torch-2.6.0+uvm.0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl");
        assert!(WheelName::parse(Path::new("torch.zip")).is_err());
    }

    #[test]
    fn repacked_wheel_is_consistent() {
        let folder = tempfile::tempdir().unwrap();
        let official = official_wheel(folder.path());
        let ours = folder.path().join("ours.so");
        fs::write(&ours, "rebuilt").unwrap();
        let out = folder.path().join("out");
        let made = repack(&official, &new_name(), &[("torch/lib/libc10_cuda.so", &ours)], &out).unwrap();
        assert_eq!(made, out.join(new_name().file_name()));

        let mut archive = ZipArchive::new(BufReader::new(File::open(&made).unwrap())).unwrap();
        let info = "torch-2.6.0+uvm.0.1.0.dist-info";
        let record = text_of(&mut archive, &format!("{info}/RECORD")).unwrap();
        for line in record.lines() {
            let (path, rest) = line.split_once(',').unwrap();
            let bytes = text_of(&mut archive, path).unwrap();
            assert_eq!(rest, if path.ends_with("RECORD") { ",".into() } else { digest(bytes.as_bytes()) }, "{path}");
        }
        assert_eq!(record.lines().count(), archive.len());
        assert_eq!(text_of(&mut archive, "torch/lib/libc10_cuda.so").unwrap(), "rebuilt");
        assert_eq!(archive.by_name("torch/lib/libc10_cuda.so").unwrap().unix_mode().unwrap() & 0o777, 0o755);
        let metadata = text_of(&mut archive, &format!("{info}/METADATA")).unwrap();
        assert!(metadata.contains("\nVersion: 2.6.0+uvm.0.1.0\n") && metadata.ends_with("Version: not this one\n"));
        let wheel = text_of(&mut archive, &format!("{info}/WHEEL")).unwrap();
        assert!(wheel.contains("Tag: cp311-cp311-manylinux_2_34_x86_64\n"), "{wheel}");
        let version = text_of(&mut archive, "torch/version.py").unwrap();
        assert!(version.contains("__version__ = '2.6.0+uvm.0.1.0'\ncuda = '12.4'"), "{version}");
    }

    #[test]
    fn wheels_that_are_not_as_expected_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let official = official_wheel(folder.path());
        let ours = folder.path().join("ours.so");
        fs::write(&ours, "rebuilt").unwrap();
        let error = repack(&official, &new_name(), &[("torch/lib/none.so", &ours)], folder.path()).unwrap_err();
        assert!(format!("{error:#}").contains("no member torch/lib/none.so"), "{error:#}");
        let not_a_zip = folder.path().join("a-1-b-c-d.whl");
        fs::write(&not_a_zip, "hello").unwrap();
        assert!(repack(&not_a_zip, &new_name(), &[], folder.path()).is_err());
    }

    #[test]
    fn record_must_list_what_changed() {
        let changed = BTreeMap::from([("a".to_owned(), b"x".to_vec()), ("b".to_owned(), b"y".to_vec())]);
        let error = edit_record("a,sha256=0,1\n", "o/", "n/", &changed).unwrap_err().to_string();
        assert!(error.contains('b'), "{error}");
    }
}
