# Tab completion in bash for python -m litdiffusion.train, sample, evaluate and report: groups, their choices, keys.
#   source scripts/completion.bash          (zsh: autoload -U +X bashcompinit && bashcompinit, before it)
_litdiffusion() {
    local words=($COMP_LINE) word="${COMP_WORDS[COMP_CWORD]}" module="${COMP_WORDS[2]}" line="${COMP_WORDS[2]}" choices each
    [[ ${words[1]} == -m && $module == litdiffusion.* ]] || return
    for each in "${COMP_WORDS[@]:3:COMP_CWORD-2}"; do
        [[ $each == -* ]] || line+=" $each"  # Hydra completes overrides alone
    done
    choices=$(COMP_LINE="$line" "${words[0]}" -m "$module" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _litdiffusion python python3
