"""Every code of a finding with its severity, why it matters and what to do. Codes are stable: programs read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """What is always the same about a finding."""

    severity: str
    why: str
    remedy: str


_B, _W, _N = "blocker", "warning", "note"
_STOPS = "Training stops at the first file it cannot use."
_REPLACE = "Copy the file again from its origin, or remove it together with its mask and its row in the table."

FILES: dict[str, Entry] = {
    "unreadable": Entry(_B, _STOPS, _REPLACE),
    "not-found": Entry(_B, _STOPS, "Bring the file, or remove its row or partner."),
    "too-small": Entry(_B, "An image of a pixel or two shows nothing.", "Replace or remove the file."),
    "too-large": Entry(
        _B,
        "A file that unpacks to more than it claims, or than a machine holds, stops the site.",
        "Cut it into tiles, or take it out.",
    ),
    "decoding-memory": Entry(
        _B,
        "A file that takes a machine's memory is damaged, made to harm, or larger than was planned for.",
        "Take it out, or allow more in data.limits.memory_mib.",
    ),
    "decoding-time": Entry(
        _B,
        "A file that is decoded for ever is damaged or made to harm.",
        "Take it out, or allow more in data.limits.seconds.",
    ),
    "decoder-died": Entry(
        _B,
        "A file that its decoder dies of is damaged or made to harm; decoding has a process of its own, so nothing "
        "else was lost.",
        _REPLACE,
    ),
    "several-pages": Entry(
        _B, "Of a file with several pages only one would be read.", "Save each page as its own file."
    ),
    "value-range": Entry(
        _B, "The scale of the grey values is unknown.", "Save it as 8- or 16-bit grey, or as DICOM or NIfTI."
    ),
    "not-finite": Entry(
        _B, "One value that is no number makes the whole model useless.", "Replace NaN and infinite values."
    ),
    "turned": Entry(
        _B, "A picture that is turned the wrong way does not lie under its mask.", "Save the picture upright."
    ),
    "mask-missing": Entry(_B, "A segmentation learns from masks.", "Add the mask, or move the image away."),
    "image-missing": Entry(_B, "A mask without its image cannot be used.", "Add the image, or move the mask away."),
    "image-needed": Entry(
        _B,
        "A case, or a sample without an image, has no pixels of its own; what reads it as one is not built for it.",
        "Report it.",
    ),
    "case-empty": Entry(_B, "Of a case without images nothing can be said.", "Bring its images, or remove its row."),
    "case-mixed": Entry(
        _B,
        "A case has one answer, one patient and one split; else the same patient is trained on and tested.",
        "Correct the table, or make them two cases.",
    ),
    "label-missing": Entry(
        _B,
        "A classification learns from labels.",
        "Give every image a class, or its row a value in each column needed.",
    ),
    "label-not-declared": Entry(
        _B,
        "Of a class that is not among labelled nothing is learned here, so its images have no label.",
        "Add the class to labelled in site.toml, or take these images out.",
    ),
    "mask-size": Entry(
        _B, "Mask and image must lie on the same grid of pixels.", "Repair the pair, or resample the mask."
    ),
    "mask-geometry": Entry(
        _B,
        "Mask and image differ in voxels, spacing or place, so the mask marks other tissue than it should.",
        "Resample one onto the grid of the other.",
    ),
    "mask-value": Entry(
        _B,
        "A value that stands for no class cannot be learned.",
        "Repair the mask, or name all classes and their values in data.options.class_names and mask_values.",
    ),
    "mask-colour": Entry(
        _B, "The classes of a coloured mask are unknown.", "Save masks as one grey channel of class numbers."
    ),
    "kinds-mixed": Entry(
        _B, "A picture does not say where it lies, so it fits no volume.", "Convert one to the other's kind of file."
    ),
    "channels": Entry(
        _B,
        "A model takes the channels it was made for: one or three, as recipe.data.channels names them.",
        "Choose them with data.options.channels (--files FILE says which), or ask for a recipe that names yours.",
    ),
    "channels-missing": Entry(
        _B, "All cases must have the channels that dataset.json names.", "Bring the missing channel files."
    ),
    "four-axes": Entry(
        _B, "Time or channels as a fourth axis are no anatomy.", "Save each time or channel as a volume of its own."
    ),
    "no-geometry": Entry(
        _B, "Without geometry nobody knows which side is left.", "Save the volume again with a proper affine."
    ),
    "series-mixed": Entry(
        _B,
        "Slices of several series do not make one volume.",
        "Choose one with data.options.series (--files FILE lists them), or put one series into each study folder.",
    ),
    "slices-missing": Entry(
        _B, "A gap in a series shifts anatomy and distances.", "Bring the missing slices, or leave the study out."
    ),
    "grey-units": Entry(
        _B,
        "Grey values would mean something else than in other hospitals.",
        "Export the series again with its rescale values, or leave it out.",
    ),
    "frames-unplaced": Entry(
        _B,
        "Slices whose place nobody knows would be put anywhere.",
        "Export as enhanced DICOM, one file a slice, or NIfTI (dcm2niix unfolds mosaics).",
    ),
    "pixel-size": Entry(
        _B, "Without the size of a pixel a volume has no shape.", "Export the series again with Pixel Spacing."
    ),
    "link": Entry(
        _B,
        "What lies behind a link may be missing, or not belong here.",
        "Bring the files themselves (git annex: get them), or remove the link.",
    ),
    "modality": Entry(
        _B, "The recipe was made for another kind of image.", "Leave these studies out, or ask the coordinator."
    ),
    "compressed": Entry(
        _B,
        "The pixels are packed in a way that cannot be read here.",
        "Save the files uncompressed.",
    ),
    "volume-needed": Entry(
        _B,
        "The recipe asks for neighbouring slices, whole volumes or values in units.",
        "Bring DICOM or NIfTI with all slices, or leave pictures and single slices out.",
    ),
    "slide-scale": Entry(
        _B,
        "A cell of unknown size cannot be compared between hospitals.",
        "Set data.options.mpp to the scanner's micrometres a pixel, or leave out slides of a coarser scanner.",
    ),
    "slide-levels": Entry(
        _B,
        "A slide that is not in tiles and levels would have to be read whole.",
        "Save it as a tiled, pyramidal TIFF.",
    ),
    "slide-needed": Entry(
        _B,
        "Tiles of slides and other images are no images of one kind.",
        "Bring what the recipe takes, or ask for a recipe that fits: of slides it has [data.slides].",
    ),
    "no-tissue": Entry(
        _B, "Of an empty slide nothing can be said.", "Look at it, and take out what is empty or too pale."
    ),
    "whole-slide": Entry(_B, "A slide of many thousand pixels is no image.", "Cut it into tiles, saved as PNG."),
    "mask-overlap": Entry(
        _B,
        "A voxel has one class, and a structure one outline.",
        "Separate the segments, keep one version of each structure, or let the last class count "
        '(data.options.overlap = "last").',
    ),
    "ending": Entry(
        _B, "Files that are not read may be images you count on.", "Convert them, or move them out of the folder."
    ),
    "name-twice": Entry(_B, "Two files of one name cannot be told apart.", "Keep one of them."),
    "class-unknown": Entry(
        _B, "A folder or label stands for no known class.", "Rename it, or name it in data.options.class_names."
    ),
    "class-empty": Entry(
        _B,
        "A class without images cannot be learned here.",
        "Add images, or remove the folder and name all classes in data.options.class_names.",
    ),
    "table": Entry(
        _B,
        "The table says which patient an image is of; where it does not fit the files, patients may mix, and columns "
        "that the recipe takes stand beside no image.",
        "Give every image one row, remove rows without an image, and give the columns that the recipe names.",
    ),
    "column-range": Entry(
        _B,
        "A value in another unit, or a slip of the pen, is learned as if it were true.",
        "Correct the cell, or bring the column into the unit of the recipe; leave a missing value empty.",
    ),
    "dataset-json": Entry(_B, "dataset.json says what the files mean.", "Correct it as the format asks."),
    "options": Entry(_B, "The data cannot be opened with these settings.", "Correct [data] in the site's file."),
    "structure": Entry(
        _B, _STOPS, "Run again with --files FILE: it names the files and the full reason, for your eyes only."
    ),
    "reader-failed": Entry(_B, _STOPS, "Remove the files; if they are sound, report the kind of error (not the file)."),
}

DATA: dict[str, Entry] = {
    "no-samples": Entry(_B, "There is nothing to train on.", "Check data.path, data.options and include."),
    "contract": Entry(
        _B,
        "Results would stand under another class's name.",
        "Map your classes in [labels], set data.options.class_names, or ask for a recipe that fits.",
    ),
    "policy-refuses": Entry(
        _B,
        "The site's own policy keeps an update from being of few patients or steps; no round would be trained.",
        "Bring more patients, or let the site's people decide on [policy] min_train_units and min_steps.",
    ),
    "no-training-sample": Entry(
        _B,
        "There is nothing to train on.",
        "Bring more patients, or lower the shares; with [privacy], before the first round, take another split.seed.",
    ),
    "no-test-sample": Entry(
        _B,
        "Without a test sample nobody knows whether the result is good here.",
        "Bring more patients; with [privacy], before the first round, take another split.seed.",
    ),
    "no-validation-sample": Entry(
        _N, "The best round cannot be chosen with this site's help.", "Bring more patients, or raise split.val_share."
    ),
    "few-training-samples": Entry(
        _W, "So few images teach little, and what they teach may be traced back to them.", "Bring more patients."
    ),
    "few-test-samples": Entry(_W, "A score of so few images is mostly chance.", "Bring more patients."),
    "few-patients": Entry(
        _W, "Images of one patient are alike; patients count, not images.", "Bring images of more patients."
    ),
    "patients-unknown": Entry(
        _W,
        "Images of one patient may land in both train and test; the score would then be too good.",
        "Add patients.csv (id,patient,site; pseudonyms are enough, site only where there are several); for DICOM "
        'data.options.patients = "hash" does it, too.',
    ),
    "patient-across-splits": Entry(
        _B,
        "A patient who is trained on and tested makes the score too good; nothing is trained so.",
        "Keep a patient in one split: mend the column 'split' of the table, or the lists of dataset.json.",
    ),
    "several-sites": Entry(
        _W, "The data names more than one site; all would count as this one.", "Name your own with include = [...]."
    ),
    "names-shown": Entry(
        _W,
        'With ids = "names" results carry file names, which often are patient numbers.',
        'Remove ids = "names" from [data.options].',
    ),
    "class-missing": Entry(
        _W,
        "The model of this site never sees that class; where it is in the images and nobody labels it here, it is "
        "taught as background.",
        "Check labels and mask values, or bring such images. Where this site does not label the class, say which it "
        "does: labelled in site.toml, under a recipe with task.partial_labels = true.",
    ),
    "class-missing-in-split": Entry(
        _W, "The class is not learned, or not tested, at this site.", "Bring more patients of that class."
    ),
    "one-class": Entry(
        _W, "With one class there is nothing to tell apart, and AUROC is not defined.", "Bring images of other classes."
    ),
    "cases-of-one": Entry(
        _W,
        "The recipe is for cases of many images, and nothing here says which images belong together: each is judged by "
        "itself.",
        "Give the table a column case, put the images of each case into a folder of its own (cases/NAME/), or bring "
        "volumes. Right where a case is one image.",
    ),
    "parts-tell-label": Entry(
        _W,
        "How many images a case has, or how large they are, tells its label: a model may learn the protocol and not "
        "the disease.",
        "Ask how cases of either label were taken; bring cases of one protocol, or bound the images of a case.",
    ),
    "values-missing": Entry(
        _W,
        "A sample without a value teaches nothing of that column and is not scored in it.",
        "Fill the cells in where the value is known.",
    ),
    "rows-missing": Entry(
        _W,
        "What the table says is not known of these: they are judged by their images alone.",
        "Compare the column id of table.csv with the names of images, studies or cases, and add rows where values are "
        "known.",
    ),
    "images-missing": Entry(
        _W,
        "Where a recipe takes them, these are learned from and answered by their row of the table alone.",
        "Bring the images where there are any, and take image = none out of those rows.",
    ),
    "images-not-taken": Entry(
        _N,
        "The recipe takes no case without an image, so these are left out of training and test.",
        "Nothing, or ask for a recipe with recipe.inputs.images_missing = true.",
    ),
    "rows-unused": Entry(
        _N,
        "A row that names nothing here is not used; often an id is written otherwise than the image's name.",
        "Correct the ids, or bring the images.",
    ),
    "input-missing": Entry(
        _N,
        "A missing value counts as the column's usual one, and the model is told that it is missing.",
        "Fill the cells in where the value is known.",
    ),
    "input-constant": Entry(
        _W,
        "A column in which nothing differs teaches nothing here, and may stand for this hospital and no patient.",
        "Check the column; ask for a recipe without it where it is so by nature.",
    ),
    "input-tells-label": Entry(
        _W,
        "A column that is the answer by itself was often written after it: the model would learn that column and fail "
        "where it is not known yet.",
        "Ask when the value is written down; ask for a recipe without a column that follows from the answer.",
    ),
    "imbalance": Entry(
        _W,
        "A rare class is easily ignored, and one answer for all images may come of it.",
        'Ask for options = { sampling = "balanced" } under [task] of the recipe, for which no count leaves this site. '
        "Where a mechanism at record or patient level forbids it, ask for task.class_weights from published "
        "prevalences.",
    ),
    "foreground-rare": Entry(
        _N,
        "A class of so few pixels is learned slowly.",
        "Nothing to do if it is small by nature; else check the masks.",
    ),
    "masks-all-empty": Entry(
        _B, "Nothing is marked, so nothing is learned.", "Check mask files and data.options.mask_values."
    ),
    "masks-mostly-empty": Entry(
        _W, "The model may learn to mark nothing.", "Check the masks; leave out images without the structure."
    ),
    "mask-empty": Entry(
        _N, "Right where the structure is absent, wrong where the mask was never drawn.", "Look at a few of them."
    ),
    "volume-empty": Entry(
        _W, "A volume without a mark is healthy, or was never annotated.", "Check these volumes, or leave them out."
    ),
    "mask-full": Entry(
        _W, "A mask without background is often inverted.", "Look at a few; check the order of mask_values."
    ),
    "duplicate-files": Entry(_W, "The same image counts several times.", "Keep one copy."),
    "duplicate-pixels": Entry(
        _W, "The same image under several names counts several times.", "Keep one, or give all the same patient."
    ),
    "duplicate-across-splits": Entry(
        _B,
        "An image that is trained on and tested makes the score too good.",
        "Keep one copy, or give the copies the same patient in patients.csv.",
    ),
    "duplicate-conflict": Entry(
        _W, "One image with two truths teaches nothing.", "Decide which label or mask is right."
    ),
    "never-negative": Entry(
        _W,
        "Hounsfield units of air, lung and fat lie below 0; values that do not may be shifted by 1024, scaled to 0 to "
        "1 or cut to a picture, and the recipe's window then shows something else than in other hospitals.",
        "Compare air in one of them with -1000, and export CT again in Hounsfield units. Right where all but one organ "
        "was cut away.",
    ),
    "blank": Entry(_W, "An image of one value shows nothing.", "Remove it, unless it is an end slice of a volume."),
    "all-blank": Entry(_B, "No image shows anything.", "Check how the images were exported, and their window."),
    "out-of-range": Entry(_B, "The source must give values from 0 to 1.", "Repair the source, or report this."),
    "small-images": Entry(
        _W, "Enlarged images are blurred, and the model sees less than it could.", "Bring the images in full size."
    ),
    "sizes-vary": Entry(
        _N, "The same structure then has different sizes for the model.", "Nothing to do if it is so by nature."
    ),
    "detail-lost": Entry(
        _W,
        "What is finer than a pixel of the recipe's input_size is not learned, and no model scores much above that.",
        'Ask for a larger input_size, or for fit = "native" (crops at the images\' own scale). Right where the '
        "structures are coarse in other hospitals' images and these are few.",
    ),
    "distorted": Entry(
        _N, "Images are stretched to the recipe's shape.", 'Crop to the region of interest, or ask for fit = "native".'
    ),
    "colour-mixed": Entry(_N, "Grey and coloured images look different to the model.", "Check that both belong here."),
    "colour-where-grey": Entry(
        _W, "The recipe takes grey images; colour is lost.", "Check for overlays and markings burned into the images."
    ),
    "polarity-mixed": Entry(
        _N,
        "Some pictures may be dark on bright, others bright on dark.",
        "Look at some of both. Only if the same structure is dark in one and bright in the other: intensity = "
        '"polarity" in '
        "the recipe. It turns every bright image round, so that images of one polarity would be made worse.",
    ),
    "spacing-unknown": Entry(
        _N, "Without the size of a pixel distances are in pixels, not millimetres.", "Use DICOM or NIfTI if you can."
    ),
    "spacing-partly": Entry(
        _W, "Distances would be in millimetres for some images and in pixels for others.", "Use one kind of file."
    ),
    "spacing-varies": Entry(
        _W,
        "The same structure then has different sizes for the model.",
        "Check the outliers; resample if they are right.",
    ),
    "orientation-mixed": Entry(
        _N, "Volumes are stored along different axes; they are turned alike when read.", "Look at the example pictures."
    ),
    "header-noted": Entry(
        _W,
        "Where a file leaves its place, its sides, its slices or its grey values in doubt, results are in doubt, too.",
        "Look at the example pictures; save the volumes again with a proper affine, or take other files out.",
    ),
    "left-out": Entry(
        _W,
        "The folder holds more than is used: fewer slices, patients or cases are trained on than you count.",
        "Run again with --files FILE: it names each with its reason. Bring what is missing, or move them away.",
    ),
    "limited": Entry(_N, "What was not looked at may hold more.", "Run again without --limit before you join."),
}

MACHINE: dict[str, Entry] = {
    "no-recipe": Entry(
        _N,
        "With a recipe the check also compares classes and image size, estimates memory and disk, and makes real "
        "training steps, so that you know how long a round takes.",
        'Add --recipe RECIPE.toml, or recipe = "..." to the site\'s file.',
    ),
    "rank-too-high": Entry(_B, "The server refuses a rank over the recipe's.", "Lower rank in the site's file."),
    "device-missing": Entry(
        _B, "The site would refuse every round.", 'Install the driver and a torch that fits it, or set device = "cpu".'
    ),
    "bfloat16-slow": Entry(
        _N,
        "Rounds take longer here than at sites with instructions for bfloat16.",
        "None needed; a GPU, or a processor with avx512_bf16 or AMX, is quicker.",
    ),
    "gpu-idle": Entry(_N, "A GPU is there, but the site's file asks for the CPU.", 'Set device = "auto".'),
    "weights-missing": Entry(_B, "The frozen backbone must lie on this machine.", "Run: fedvfm weights fetch NAME"),
    "memory-short": Entry(
        _B, "The operating system would stop the training.", "Free memory, lower cache_mib, or ask for smaller batches."
    ),
    "memory-tight": Entry(_W, "Another program may take what the training needs.", "Free memory, or lower cache_mib."),
    "gpu-memory-short": Entry(
        _B, "The training step would fail.", "Free the GPU, ask for smaller batches or images, or use the CPU."
    ),
    "disk-short": Entry(_B, "Adapters and logs could not be saved.", "Free space."),
    "disk-tight": Entry(_W, "A full disk stops the site in the middle of a run.", "Free space."),
    "step-failed": Entry(
        _B, "What fails here fails in the federation.", "Solve it as the message says, then check again."
    ),
    "step-skipped": Entry(
        _N, "No training step was made, so its time is not known.", "Solve the blockers above, then check again."
    ),
    "round-slow": Entry(
        _W,
        "The server waits an hour for a round by default; a slower site is left out of it.",
        "Use a GPU, lower optimiser.local_epochs with the coordinator, or ask for a longer round_timeout_s.",
    ),
}

ENTRIES: dict[str, Entry] = {**FILES, **DATA, **MACHINE}
