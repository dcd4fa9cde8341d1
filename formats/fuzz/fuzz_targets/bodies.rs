//! What the fuzz targets do with their input. `tests/corpus.rs` does the same with the checked-in corpus, on stable.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use robocache_formats::{Dataset, Manifest, OpenOptions, StreamKind, Time, draft_manifest};

/// Every column a stream, at a rate: nothing of a table is left unread.
const EVERY_COLUMN: &str = "layout = \"frames\"\n[frames]\ntime = { rate = 10.0 }\n";
/// As many episodes as are read: a table of many is no other code.
const EPISODES: usize = 8;

/// Any bytes are a table or an error; what is read of it is as long as it says.
pub fn table(data: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("room for it");
    read(file.path(), EVERY_COLUMN);
    if let Ok((drafted, _)) = draft_manifest(file.path()) {
        // Where no column can be a clock, all that is drafted are comments.
        let declares = drafted.lines().any(|line| line.starts_with('['));
        if let Err(error) = Manifest::parse(&drafted, file.path())
            && declares
        {
            panic!("a draft that does not parse: {error}\n{drafted}");
        }
        read(file.path(), &drafted);
    }
}

fn read(path: &Path, manifest: &str) {
    if let Ok(dataset) = Dataset::open(path, &OpenOptions { manifest: Some(manifest.to_owned()) }) {
        read_all(&dataset);
    }
}

/// What begins each file of a directory, before its name and a line's end.
const FILE: &[u8] = b"\0\0file ";
/// A directory of more is no other code.
const FILES: usize = 12;

/// Any files are a LeRobot dataset or an error. `data` holds them one after another, each begun by [`FILE`]. Streams that
/// were read whole, in all episodes.
pub fn lerobot(data: &[u8]) -> usize {
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut rest = data;
    for _ in 0..FILES {
        let Some(start) = find(rest, FILE) else { break };
        let file = &rest[start + FILE.len()..];
        let body = &file[..find(file, FILE).unwrap_or(file.len())];
        rest = &file[body.len()..];
        let Some(end) = find(body, b"\n") else { continue };
        let Ok(name) = std::str::from_utf8(&body[..end]) else { continue };
        let plain = |part| matches!(part, std::path::Component::Normal(name) if name.len() < 100);
        if name.is_empty() || name.contains('\0') || !Path::new(name).components().all(plain) {
            continue;
        }
        let path = root.path().join(name);
        // A name that is another's directory is left out.
        if std::fs::create_dir_all(path.parent().expect("below the root")).is_ok() {
            std::fs::write(path, &body[end + 1..]).ok();
        }
    }
    Dataset::open(root.path(), &OpenOptions::default()).map_or(0, |dataset| read_all(&dataset))
}

fn find(data: &[u8], what: &[u8]) -> Option<usize> {
    data.windows(what.len()).position(|window| window == what)
}

fn read_all(dataset: &Dataset) -> usize {
    let mut whole = 0;
    for episode in 0..dataset.episodes().len().min(EPISODES) {
        if let Ok((first, last)) = dataset.span(episode) {
            assert!(first <= last);
        }
        for (stream, schema) in dataset.streams().iter().enumerate() {
            if matches!(schema.kind, StreamKind::Opaque { .. }) {
                continue;
            }
            // One by one: an error of one stream hides nothing of the others.
            let Ok(read) = dataset.read(&[episode], &[stream]) else { continue };
            let (clock, values) = (&read[0][0].clock, &read[0][0].values);
            assert_eq!((values.dtype, values.dim), (schema.dtype, schema.dim()));
            assert_eq!(clock.rows(), values.rows);
            assert!(clock.first_ns() <= clock.last_ns());
            let elements = values.rows * values.dim;
            assert!(values.buffer.len() >= elements * values.dtype.size_bytes());
            if schema.kind == StreamKind::Text {
                let Ok(texts) = dataset.texts(stream) else { continue };
                for code in values.buffer.typed_data::<i32>().iter().take(elements) {
                    assert!(usize::try_from(*code).is_ok_and(|code| code < texts.len()) || *code == -1);
                }
            }
            whole += 1;
        }
    }
    whole
}

/// Any text is a manifest or an error; one that was checked says nothing that a reader would have to doubt.
pub fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let origin = Path::new("robocache.toml");
    let found = match Manifest::parse(text, origin) {
        Ok(found) => found,
        Err(error) => {
            assert!(error.to_string().contains("robocache.toml"), "{error}");
            return;
        }
    };
    let streams = found.streams.iter();
    let names: BTreeSet<&str> = streams.clone().map(|stream| stream.name.as_str()).collect();
    assert_eq!(names.len(), found.streams.len());
    for stream in streams.clone() {
        assert!(!stream.columns.is_empty(), "{stream:?}");
        assert!(stream.line >= 1);
    }
    let times = streams.clone().filter_map(|stream| stream.time.as_ref()).chain(&found.frames.time);
    for time in times {
        match time {
            Time::Rate(hz) => assert!(hz.is_finite() && *hz > 0.0),
            Time::Column { column, .. } => assert!(!column.is_empty()),
        }
    }
    let paths = streams.filter_map(|stream| stream.file.as_ref());
    for path in paths.chain(&found.episodes).chain(&found.frames.files) {
        let inside = |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir);
        assert!(Path::new(path).components().all(inside), "{path:?} leads out of the dataset");
    }
}
